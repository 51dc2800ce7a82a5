#!/usr/bin/env python3
"""Compiles the CUDA kernels of shaders/src into the images that the crate embeds.

Needs NVIDIA's run-time compiler from PyPI, no toolkit, driver or GPU:

    python3 -m venv venv
    venv/bin/pip install --no-deps nvidia-cuda-nvrtc-cu12==12.9.86 --target nvrtc
    venv/bin/pip install --no-deps nvidia-cuda-nvrtc-cu12==12.0.140 --target nvrtc-old
    AWQUA_NVRTC=nvrtc AWQUA_NVRTC_OLD=nvrtc-old python3 shaders/cuda/build.py [--check]

The new compiler makes one image of machine code for each architecture; the old one makes assembly (PTX) that every
driver from CUDA 12.0 on can finish for architectures that came later. `--check` compares with what is committed and
writes nothing.
"""

import argparse
import ctypes
import glob
import hashlib
import os
import struct
import sys
import zlib

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE = os.path.join(HERE, "..", "src")
# 9.0 with its own matrix instructions, which later ones do not have.
ARCHITECTURES = ["75", "80", "86", "89", "90a", "100", "120"]
ASSEMBLY = "80"
COMPILER, OLD_COMPILER = (12, 9), (12, 0)


def sources():
    """Names and texts of all files that the images are made from, in order."""
    names = [os.path.join(HERE, "kernels.cu")]
    names += sorted(glob.glob(os.path.join(SOURCE, "*.cu")) + glob.glob(os.path.join(SOURCE, "prelude", "*.cuh")))
    return [(os.path.relpath(name, os.path.join(HERE, "..")), open(name, "rb").read()) for name in names]


def source_hash():
    digest = hashlib.sha256()
    for name, text in sources():
        digest.update(name.replace(os.sep, "/").encode() + b"\0" + text + b"\0")
    return digest.hexdigest()


class Compiler:
    def __init__(self, folder, version):
        found = glob.glob(os.path.join(folder, "**", "libnvrtc.so.12"), recursive=True)
        found += glob.glob(os.path.join(folder, "**", "nvrtc64_120_0.dll"), recursive=True)
        if not found:
            sys.exit(f"no libnvrtc in {folder}")
        builtins = glob.glob(os.path.join(os.path.dirname(found[0]), "libnvrtc-builtins.so.*"))
        for name in builtins:
            if ".alt." not in name:
                ctypes.CDLL(name)
        self.lib = ctypes.CDLL(found[0])
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.check(self.lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
        if (major.value, minor.value) != version:
            sys.exit(f"{found[0]} is version {major.value}.{minor.value}, expected {version[0]}.{version[1]}")

    def check(self, code, what):
        if code:
            sys.exit(f"{what} failed with code {code}")

    def compile(self, architecture, assembly):
        text = open(os.path.join(HERE, "kernels.cu"), "rb").read()
        program = ctypes.c_void_p()
        code = self.lib.nvrtcCreateProgram(ctypes.byref(program), text, b"kernels.cu", 0, None, None)
        self.check(code, "nvrtcCreateProgram")
        kind = "compute" if assembly else "sm"
        options = [f"--gpu-architecture={kind}_{architecture}", "--std=c++17", "--include-path=" + SOURCE]
        array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        code = self.lib.nvrtcCompileProgram(program, len(options), array)
        size = ctypes.c_size_t()
        self.lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        self.lib.nvrtcGetProgramLog(program, log)
        if log.value.strip():
            print(log.value.decode(), file=sys.stderr)
        self.check(code, f"compiling for {architecture}")
        what = "PTX" if assembly else "CUBIN"
        self.check(getattr(self.lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), what)
        image = ctypes.create_string_buffer(size.value)
        self.check(getattr(self.lib, f"nvrtcGet{what}")(program, image), what)
        self.lib.nvrtcDestroyProgram(ctypes.byref(program))
        return image.raw


def codes(image):
    """The sections of an ELF image that hold instructions of 16 bytes."""
    (table,) = struct.unpack_from("<Q", image, 0x28)
    size, count = struct.unpack_from("<HH", image, 0x3A)
    for section in range(table, table + count * size, size):
        _, _, flags, _, offset, length = struct.unpack_from("<IIQQQQ", image, section)
        if flags & 4:
            yield image[offset:offset + length]


def check_copies(name, image):
    """Fails for asynchronous copies (LDGSTS) in the one form that NVRTC 12.9 gets wrong: an offset in a uniform register
    beside a cache policy, whose descriptor then begins at an odd register, which devices refuse as illegal."""
    wrong = sum(code[i] == 0xAE and code[i + 1] & 0x0F == 0x0D for code in codes(image) for i in range(0, len(code), 16))
    if wrong:
        sys.exit(f"{name} has {wrong} copies that devices may refuse; change the kernel")


def pack(image):
    """A raw deflate stream."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(image) + packer.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed images")
    parser.add_argument("--only", help="an architecture, or ptx; for trying things out")
    arguments = parser.parse_args()
    new = Compiler(os.environ.get("AWQUA_NVRTC", "nvrtc"), COMPILER)
    old = Compiler(os.environ.get("AWQUA_NVRTC_OLD", "nvrtc-old"), OLD_COMPILER)
    jobs = [(f"sm_{a}.cubin", lambda a=a: new.compile(a, False)) for a in ARCHITECTURES]
    jobs.append((f"compute_{ASSEMBLY}.ptx", lambda: old.compile(ASSEMBLY, True)))
    if arguments.only:
        jobs = [job for job in jobs if arguments.only in job[0]]
    hashes = [f"sources {source_hash()}"]
    for name, make in jobs:
        image = make()
        if name.endswith(".cubin"):
            check_copies(name, image)
        digest = hashlib.sha256(image).hexdigest()
        hashes.append(f"{name} {digest}")
        packed = pack(image)
        print(f"{name}: {len(image)} bytes, {len(packed)} packed")
        path = os.path.join(HERE, name + ".deflate")
        if arguments.check:
            committed = zlib.decompress(open(path, "rb").read(), -15)
            if hashlib.sha256(committed).hexdigest() != digest:
                sys.exit(f"{name} differs from the committed one: run shaders/cuda/build.py")
        else:
            open(path, "wb").write(packed)
    if not arguments.only and not arguments.check:
        open(os.path.join(HERE, "hashes.txt"), "w").write("\n".join(hashes) + "\n")


if __name__ == "__main__":
    main()
