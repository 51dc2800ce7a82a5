// Awqua for C#: put this file, Native.cs and the native library (Plugins/libawqua.so, awqua.dll or libawqua.dylib) into a
// Unity project, or compile them with Mono or .NET. C# 7, no unsafe code.
using System;
using System.Collections.Generic;
using System.IO;
using System.Runtime.InteropServices;
using System.Text;

namespace Awqua
{
    public enum Backend : uint { Auto = 0, Cpu = 1, Gpu = 2, Cuda = 3 }

    public enum GrammarKind : uint { None = 0, JsonSchema = 1, Regex = 2, Lark = 3 }

    public enum Trim : uint { Pages = 0, Sessions = 1, Weights = 2 }

    public enum LogLevel : uint { Off = 0, Error = 1, Warn = 2, Info = 3, Debug = 4 }

    public enum EventKind : uint { Progress = 4, DeviceLost = 5, MemoryPressure = 6 }

    public enum StopReason : uint { None = 0, Eos = 1, Text = 2, MaxTokens = 3, ContextFull = 4, Cancelled = 5, Complete = 6 }

    /// <summary>A failed call: its status and the text behind it.</summary>
    public sealed class AwquaException : Exception
    {
        public int Status { get; }

        internal AwquaException(int status, string text) : base(text) { Status = status; }
    }

    /// <summary>How to answer; the defaults are the library's.</summary>
    public sealed class Request
    {
        public uint MaxTokens = 512;
        public float Temperature = 0.7f;
        public uint TopK = 40;
        public float TopP = 0.95f;
        public ulong Seed;
        public bool IgnoreEos;

        /// <summary>What the answer has to look like; needs a library with grammars.</summary>
        public GrammarKind GrammarKind;
        public string Grammar = "";
    }

    /// <summary>Capacities of a session; zero takes the default.</summary>
    public sealed class SessionOptions
    {
        public uint Context, Chunk;
        public bool Deterministic, Exact, ShareForks;
    }

    /// <summary>What an engine is made from; zero and null take the defaults.</summary>
    public sealed class EngineOptions
    {
        public Backend Backend;

        /// <summary>Part of the adapter's name.</summary>
        public string Device = "";

        /// <summary>Most bytes of memory; what does not fit is refused with the needed number.</summary>
        public ulong HostBudgetBytes, DeviceBudgetBytes;

        /// <summary>Goes on after the loss of a device without Recover.</summary>
        public bool AutoRecover;

        /// <summary>CPU threads of a session, or of <see cref="ParallelFor"/>.</summary>
        public uint Threads;

        /// <summary>The host's own threads for the CPU: calls its second argument once with every number below the
        /// first, at once or in turn, and returns once those calls have; such as (n, body) => Parallel.For(0, n, body).
        /// It must not throw.</summary>
        public Action<int, Action<int>> ParallelFor;
    }

    /// <summary>Where models run.</summary>
    public sealed class Engine : IDisposable
    {
        internal readonly EngineHandle Handle;

        public Engine(Backend backend = Backend.Auto) : this(new EngineOptions { Backend = backend }) { }

        public Engine(EngineOptions how)
        {
            var device = new Utf8(how.Device);
            var pinned = default(GCHandle);
            try
            {
                var desc = new Native.EngineDesc { StructSize = (uint)Marshal.SizeOf(typeof(Native.EngineDesc)) };
                Native.Check(Native.awqua_engine_desc_init(ref desc));
                desc.Flags = how.AutoRecover ? 2u : 0;
                desc.Backend = (uint)how.Backend;
                desc.Threads = how.Threads;
                desc.Device = device.Str;
                desc.HostBudgetBytes = how.HostBudgetBytes;
                desc.DeviceBudgetBytes = how.DeviceBudgetBytes;
                if (how.ParallelFor != null)
                {
                    // Sessions may outlive the engine and still call it, so it is not freed once there is one.
                    var jobs = new Jobs { ParallelFor = how.ParallelFor, Threads = (int)Math.Max(how.Threads, 1) };
                    pinned = GCHandle.Alloc(jobs);
                    desc.ParallelFor = Native.ParallelForCallback;
                    desc.ParallelForUser = GCHandle.ToIntPtr(pinned);
                }
                Native.Check(Native.awqua_engine_create(ref desc, out Handle));
                pinned = default(GCHandle);
            }
            finally
            {
                if (pinned.IsAllocated) pinned.Free();
                device.Free();
            }
        }

        /// <summary>Bytes that models and sessions hold, in host and device memory.</summary>
        public void Used(out ulong hostBytes, out ulong deviceBytes)
        {
            var info = new Native.EngineInfo { StructSize = (uint)Marshal.SizeOf(typeof(Native.EngineInfo)) };
            Native.Check(Native.awqua_engine_get_info(Handle, ref info));
            hostBytes = info.HostBytes;
            deviceBytes = info.DeviceBytes;
        }

        /// <summary>Sends messages to <paramref name="heard"/>, from any thread that is inside the library; null turns
        /// them off.</summary>
        public static void SetLog(Action<LogLevel, string> heard, LogLevel level = LogLevel.Warn)
        {
            Native.Heard = heard;
            var callback = heard == null ? null : Native.LogCallback;
            Native.Check(Native.awqua_set_log(callback, IntPtr.Zero, (uint)level));
        }

        /// <summary>Has the library take its memory from <paramref name="alloc"/>, which is given bytes and their
        /// alignment, a power of two, and returns zero if there are none; <paramref name="free"/> gets the same numbers
        /// behind the address. Any thread calls them, and they must neither throw nor call the library. Before every
        /// other call, once and for good.</summary>
        public static void SetAllocator(Func<ulong, ulong, IntPtr> alloc, Action<IntPtr, ulong, ulong> free)
        {
            if (alloc == null || free == null) throw new ArgumentNullException();
            var allocator = new Native.Allocator
            {
                StructSize = (uint)Marshal.SizeOf(typeof(Native.Allocator)),
                Alloc = Native.AllocCallback,
                Free = Native.FreeCallback,
            };
            Native.SetAllocator(alloc, free, ref allocator);
        }

        /// <summary>Lets go of a lost device; models and sessions find another one in their next ticks.</summary>
        public void Recover() => Native.Check(Native.awqua_engine_recover(Handle));

        /// <summary>Asks all sessions to give memory back in their next ticks.</summary>
        public void Trim(Trim level) => Native.Check(Native.awqua_engine_trim(Handle, (uint)level));

        public void Dispose() => Handle.Dispose();
    }

    /// <summary>Memory that a model and a session on it take, in bytes.</summary>
    public struct Estimate
    {
        public ulong WeightsHost, WeightsDevice, SessionHost, SessionDevice;
    }

    /// <summary>Weights on a device with a tokenizer. Tick it until it is ready.</summary>
    public sealed class Model : IDisposable
    {
        internal readonly ModelHandle Handle;

        /// <summary>Begins to load the checkpoint in a folder.</summary>
        public Model(Engine engine, string path) : this(engine, path, null) { }

        /// <summary>Begins to load a checkpoint from wherever it is, such as an asset bundle or the inside of an APK:
        /// <paramref name="open"/> opens a file of that name (config.json, model.safetensors, ...) as a stream that can
        /// seek, or returns null if there is none. <paramref name="path"/> is what messages call the checkpoint.</summary>
        public Model(Engine engine, string path, Func<string, Stream> open)
        {
            var text = new Utf8(path);
            var io = default(Native.Io);
            var ioMemory = IntPtr.Zero;
            try
            {
                var desc = new Native.ModelDesc { StructSize = (uint)Marshal.SizeOf(typeof(Native.ModelDesc)) };
                Native.Check(Native.awqua_model_desc_init(ref desc));
                desc.Path = text.Str;
                if (open != null)
                {
                    io = Native.IoOf(open);
                    ioMemory = Marshal.AllocHGlobal(Marshal.SizeOf(typeof(Native.Io)));
                    Marshal.StructureToPtr(io, ioMemory, false);
                    desc.Io = ioMemory;
                }
                var status = Native.awqua_model_create(engine.Handle, ref desc, out Handle);
                // On success it is freed with the model, by `release`.
                if (status < 0 && open != null) GCHandle.FromIntPtr(io.User).Free();
                Native.Check(status);
            }
            finally
            {
                text.Free();
                Marshal.FreeHGlobal(ioMemory);
            }
        }

        /// <summary>What the model and a session take, read from the headers of its files; also before loading.</summary>
        public Estimate Estimate(SessionOptions options = null)
        {
            var desc = Native.SessionDescOf(options ?? new SessionOptions());
            var found = new Native.EstimateDesc { StructSize = (uint)Marshal.SizeOf(typeof(Native.EstimateDesc)) };
            Native.Check(Native.awqua_model_estimate(Handle, ref desc, ref found));
            return new Estimate
            {
                WeightsHost = found.WeightsHost,
                WeightsDevice = found.WeightsDevice,
                SessionHost = found.SessionHost,
                SessionDevice = found.SessionDevice,
            };
        }

        /// <summary>Loads for about the given time; true once the model is ready.</summary>
        public bool Tick(TimeSpan time, out float share)
        {
            var budget = Native.BudgetOf(time);
            var progress = new Native.LoadProgress { StructSize = (uint)Marshal.SizeOf(typeof(Native.LoadProgress)) };
            var status = Native.Check(Native.awqua_model_tick(Handle, ref budget, ref progress));
            share = progress.Total > 0 ? (float)progress.Done / progress.Total : 0;
            return status == Native.Ok;
        }

        public void Cancel() => Native.Check(Native.awqua_model_cancel(Handle));

        /// <summary>Gives the memory of the weights back, and brings them back with the next ticks.</summary>
        public void Evict() => Native.Check(Native.awqua_model_evict(Handle));

        public void Restore() => Native.Check(Native.awqua_model_restore(Handle));

        public void Dispose() => Handle.Dispose();
    }

    /// <summary>One conversation with a model.</summary>
    public sealed class Session : IDisposable
    {
        internal readonly SessionHandle Handle;
        private byte[] buffer = new byte[256];

        public Session(Model model, SessionOptions options = null)
        {
            var desc = Native.SessionDescOf(options ?? new SessionOptions());
            Native.Check(Native.awqua_session_create(model.Handle, ref desc, out Handle));
        }

        private Session(SessionHandle handle) { Handle = handle; }

        /// <summary>Begins to continue a text.</summary>
        public void Begin(string prompt, Request how = null)
        {
            Utf8 text = new Utf8(prompt), grammar = new Utf8(how?.Grammar ?? "");
            try
            {
                var request = Native.RequestOf(how ?? new Request(), grammar);
                Native.Check(Native.awqua_session_begin_text(Handle, text.Str, ref request));
            }
            finally { text.Free(); grammar.Free(); }
        }

        /// <summary>Begins to answer a conversation of (role, content) turns, with the model's own template.</summary>
        public void Begin(IList<KeyValuePair<string, string>> conversation, Request how = null)
        {
            var texts = new List<Utf8>();
            var grammar = new Utf8(how?.Grammar ?? "");
            try
            {
                var messages = new Native.Message[conversation.Count];
                for (var i = 0; i < messages.Length; i++)
                {
                    texts.Add(new Utf8(conversation[i].Key));
                    texts.Add(new Utf8(conversation[i].Value));
                    messages[i].Role = texts[2 * i].Str;
                    messages[i].Content = texts[2 * i + 1].Str;
                }
                var request = Native.RequestOf(how ?? new Request(), grammar);
                Native.Check(Native.awqua_session_begin_chat(Handle, messages, (ulong)messages.Length, ref request));
            }
            finally { texts.ForEach(text => text.Free()); grammar.Free(); }
        }

        /// <summary>Works for about the given time; true while there is more to do.</summary>
        public bool Tick(TimeSpan time)
        {
            var budget = Native.BudgetOf(time);
            return Native.Check(Native.awqua_session_tick(Handle, ref budget, IntPtr.Zero)) == Native.Pending;
        }

        /// <summary>Appends new text to <paramref name="to"/>; the reason if the answer ended, else None.
        /// <paramref name="heard"/> gets what else happened, with the tokens of the prompt that were computed and
        /// their number.</summary>
        public StopReason Poll(StringBuilder to, Action<EventKind, uint, uint> heard = null)
        {
            // Events come as whole characters, so each piece decodes on its own.
            var pin = GCHandle.Alloc(buffer, GCHandleType.Pinned);
            try
            {
                for (;;)
                {
                    var e = new Native.Event
                    {
                        StructSize = (uint)Marshal.SizeOf(typeof(Native.Event)),
                        Text = pin.AddrOfPinnedObject(),
                        TextCapacity = (ulong)buffer.Length,
                    };
                    if (Native.Check(Native.awqua_session_poll(Handle, ref e)) == Native.Empty) return StopReason.None;
                    if (e.Kind == Native.EventText) to.Append(Encoding.UTF8.GetString(buffer, 0, (int)e.TextLen));
                    else if (e.Kind == Native.EventDone) return (StopReason)e.Reason;
                    else if (e.Kind == Native.EventError) throw Native.ErrorOf(e.Status, Handle);
                    else heard?.Invoke((EventKind)e.Kind, e.Done, e.Total);
                }
            }
            finally { pin.Free(); }
        }

        /// <summary>A session that holds what this one does, without computing it again.</summary>
        public Session Fork()
        {
            Native.Check(Native.awqua_session_fork(Handle, out var forked));
            return new Session(forked);
        }

        /// <summary>What the session holds, for Restore in this run or a later one.</summary>
        public byte[] Save()
        {
            var status = Native.awqua_session_save(Handle, null, 0, out var length);
            if (status != Native.BufferTooSmall) Native.Check(status);
            var bytes = new byte[length];
            Native.Check(Native.awqua_session_save(Handle, bytes, length, out _));
            return bytes;
        }

        public void Restore(byte[] snapshot) =>
            Native.Check(Native.awqua_session_restore(Handle, snapshot, (ulong)snapshot.Length));

        /// <summary>Forgets all but the first tokens.</summary>
        public void Truncate(uint tokens) => Native.Check(Native.awqua_session_truncate(Handle, tokens));

        /// <summary>Gives the memory of an idle session back; it is computed again when it is needed.</summary>
        public void Trim() => Native.Check(Native.awqua_session_trim(Handle));

        /// <summary>Begins to embed a text; Tick to its end, then Embedding has the vector.</summary>
        public void BeginEmbedding(string text)
        {
            var bytes = new Utf8(text);
            try { Native.Check(Native.awqua_session_begin_embedding_text(Handle, bytes.Str)); }
            finally { bytes.Free(); }
        }

        public float[] Embedding()
        {
            var status = Native.awqua_session_get_embedding(Handle, null, 0, out var count);
            if (status != Native.BufferTooSmall) Native.Check(status);
            var values = new float[count];
            Native.Check(Native.awqua_session_get_embedding(Handle, values, count, out _));
            return values;
        }

        /// <summary>Ends the answer at the next tick. Any thread, any time.</summary>
        public void Cancel() => Native.Check(Native.awqua_session_cancel(Handle));

        public void Dispose() => Handle.Dispose();
    }

    /// <summary>Sessions of one model that decode together, the weights read once for all of them.</summary>
    public sealed class Batch : IDisposable
    {
        private readonly BatchHandle handle;
        private IntPtr[] pointers = new IntPtr[0];

        /// <summary>For sessions made with these options, so many at a time; more take turns.</summary>
        public Batch(Model model, int sessions, SessionOptions options = null)
        {
            var desc = Native.SessionDescOf(options ?? new SessionOptions());
            Native.Check(Native.awqua_batch_create(model.Handle, ref desc, (uint)sessions, out handle));
        }

        /// <summary>Works on the answers of all of them for about the given time; true while there is more to do. Poll
        /// each session for what came of it.</summary>
        public bool Tick(IList<Session> sessions, TimeSpan time)
        {
            if (pointers.Length < sessions.Count) pointers = new IntPtr[sessions.Count];
            var held = 0;
            try
            {
                // Neither collected nor disposed before the call returned; one that was disposed throws.
                for (var added = false; held < sessions.Count; held++, added = false)
                {
                    sessions[held].Handle.DangerousAddRef(ref added);
                    pointers[held] = sessions[held].Handle.DangerousGetHandle();
                }
                var budget = Native.BudgetOf(time);
                var status = Native.awqua_batch_tick(handle, pointers, (uint)held, ref budget, IntPtr.Zero);
                return Native.Check(status) == Native.Pending;
            }
            finally
            {
                while (held > 0) sessions[--held].Handle.DangerousRelease();
            }
        }

        public void Dispose() => handle.Dispose();
    }
}
