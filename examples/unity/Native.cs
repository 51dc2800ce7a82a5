// The functions and structures of awqua.h that Awqua.cs uses, declared as in the header: the library refuses structures by
// their size should they ever differ.
using System;
using System.IO;
using System.Runtime.InteropServices;
using System.Text;
using System.Threading;

namespace Awqua
{
    /// <summary>Tells IL2CPP, which looks for this name, that native code calls a method.</summary>
    [AttributeUsage(AttributeTargets.Method)]
    internal sealed class MonoPInvokeCallbackAttribute : Attribute
    {
        internal MonoPInvokeCallbackAttribute(Type type) { Type = type; }

        internal Type Type { get; }
    }

    /// <summary>The host's threads.</summary>
    internal sealed class Jobs
    {
        internal Action<int, Action<int>> ParallelFor;
        internal int Threads;
    }

    /// <summary>A string as UTF-8 outside the collector's reach.</summary>
    internal struct Utf8
    {
        internal Native.Str Str;

        internal Utf8(string text)
        {
            var bytes = Encoding.UTF8.GetBytes(text);
            Str.Data = Marshal.AllocHGlobal(Math.Max(bytes.Length, 1));
            Str.Len = (ulong)bytes.Length;
            Marshal.Copy(bytes, 0, Str.Data, bytes.Length);
        }

        internal void Free() => Marshal.FreeHGlobal(Str.Data);
    }

    internal abstract class Owned : SafeHandle
    {
        protected Owned() : base(IntPtr.Zero, true) { }

        public override bool IsInvalid => handle == IntPtr.Zero;
    }

    // Frees may come in any order, so the collector's order is fine.
    internal sealed class EngineHandle : Owned
    {
        protected override bool ReleaseHandle() => Native.awqua_engine_free(handle) == Native.Ok;
    }

    internal sealed class ModelHandle : Owned
    {
        protected override bool ReleaseHandle() => Native.awqua_model_free(handle) == Native.Ok;
    }

    internal sealed class SessionHandle : Owned
    {
        protected override bool ReleaseHandle() => Native.awqua_session_free(handle) == Native.Ok;
    }

    internal sealed class BatchHandle : Owned
    {
        protected override bool ReleaseHandle() => Native.awqua_batch_free(handle) == Native.Ok;
    }

    internal static class Native
    {
#if UNITY_IOS && !UNITY_EDITOR
        private const string Library = "__Internal";
#else
        private const string Library = "awqua";
#endif
        internal const int Ok = 0, Pending = 1, Empty = 2, BufferTooSmall = -3, ErrorIo = -9;
        internal const uint EventText = 1, EventDone = 2, EventError = 3;
        private const uint IgnoreEos = 1;

        [StructLayout(LayoutKind.Sequential)]
        internal struct Str
        {
            internal IntPtr Data;
            internal ulong Len;

            internal string Text()
            {
                var bytes = new byte[Len];
                if (Len > 0) Marshal.Copy(Data, bytes, 0, bytes.Length);
                return Encoding.UTF8.GetString(bytes);
            }
        }

        [StructLayout(LayoutKind.Sequential)]
        internal struct EngineDesc
        {
            internal uint StructSize, Flags, Backend, Threads;
            internal Str Device;
            internal ulong HostBudgetBytes, DeviceBudgetBytes;
            internal IntPtr PipelineCache;
            internal ulong PipelineCacheLen;
            internal ulong Uuid0, Uuid1, Luid;
            internal ParallelForFn ParallelFor;
            internal IntPtr ParallelForUser, Vulkan;
        }

        [StructLayout(LayoutKind.Sequential)]
        internal struct EngineInfo { internal uint StructSize, Flags; internal ulong HostBytes, DeviceBytes; }

        [StructLayout(LayoutKind.Sequential)]
        internal struct ModelDesc
        {
            internal uint StructSize, Flags;
            internal Str Path;
            internal IntPtr Files;
            internal ulong NFiles;
            internal IntPtr Io;
        }

        [StructLayout(LayoutKind.Sequential)]
        internal struct Io
        {
            internal uint StructSize, Flags;
            internal IntPtr User;
            internal OpenFn Open;
            internal ReadAtFn ReadAt;
            internal IntPtr Map;
            internal CloseFn Close;
            internal ReleaseFn Release;
        }

        [StructLayout(LayoutKind.Sequential)]
        internal struct EstimateDesc
        {
            internal uint StructSize, Flags;
            internal ulong WeightsHost, WeightsDevice, SessionHost, SessionDevice;
        }

        [StructLayout(LayoutKind.Sequential)]
        internal struct Budget { internal uint StructSize, Flags; internal ulong CpuUs; }

        [StructLayout(LayoutKind.Sequential)]
        internal struct LoadProgress { internal uint StructSize, Flags; internal ulong Done, Total; }

        [StructLayout(LayoutKind.Sequential)]
        internal struct Message { internal Str Role, Content; }

        [StructLayout(LayoutKind.Sequential)]
        internal struct RequestDesc
        {
            internal uint StructSize, Flags, MaxTokens, TopK;
            internal float TopP, MinP, Temperature, RepetitionPenalty, PresencePenalty, FrequencyPenalty;
            internal uint PenaltyWindow, NStops;
            internal ulong Seed;
            internal IntPtr Stops, StopIds;
            internal uint NStopIds, Reserved;
            internal IntPtr Biases, BannedIds;
            internal uint NBiases, NBannedIds, ShiftKeep, GrammarKind;
            internal Str Grammar;
        }

        [StructLayout(LayoutKind.Sequential)]
        internal struct SessionDesc { internal uint StructSize, Flags, Context, KvType, Chunk, Reserved; }

        [StructLayout(LayoutKind.Sequential)]
        internal struct Event
        {
            internal uint StructSize, Flags, Kind, Reason;
            internal int Status;
            internal uint Reserved;
            internal IntPtr Text;
            internal ulong TextCapacity, TextLen, TextWaiting;
            internal uint Done, Total;
        }

        [StructLayout(LayoutKind.Sequential)]
        internal struct Allocator
        {
            internal uint StructSize, Flags;
            internal IntPtr User;
            internal AllocFn Alloc;
            internal FreeFn Free;
        }

        [UnmanagedFunctionPointer(CallingConvention.Cdecl)]
        internal delegate IntPtr AllocFn(IntPtr user, ulong size, ulong align);

        [UnmanagedFunctionPointer(CallingConvention.Cdecl)]
        internal delegate void FreeFn(IntPtr user, IntPtr memory, ulong size, ulong align);

        [UnmanagedFunctionPointer(CallingConvention.Cdecl)]
        internal delegate void LogFn(IntPtr user, uint level, Str text);

        [UnmanagedFunctionPointer(CallingConvention.Cdecl)]
        internal delegate void TaskFn(IntPtr context, uint index, uint worker);

        [UnmanagedFunctionPointer(CallingConvention.Cdecl)]
        internal delegate void ParallelForFn(IntPtr user, uint count, IntPtr task, IntPtr context);

        [UnmanagedFunctionPointer(CallingConvention.Cdecl)]
        internal delegate int OpenFn(IntPtr user, Str name, out IntPtr file, out ulong size);

        [UnmanagedFunctionPointer(CallingConvention.Cdecl)]
        internal delegate int ReadAtFn(IntPtr user, IntPtr file, ulong offset, IntPtr buffer, ulong size);

        [UnmanagedFunctionPointer(CallingConvention.Cdecl)]
        internal delegate void CloseFn(IntPtr user, IntPtr file);

        [UnmanagedFunctionPointer(CallingConvention.Cdecl)]
        internal delegate void ReleaseFn(IntPtr user);

        // Fields, so that the collector leaves them alone while the library may call them. No exception gets out of one.
        internal static readonly AllocFn AllocCallback = OnAlloc;
        internal static readonly FreeFn FreeCallback = OnFree;
        internal static readonly LogFn LogCallback = OnLog;
        internal static readonly ParallelForFn ParallelForCallback = OnParallelFor;
        private static readonly OpenFn OpenCallback = OnOpen;
        private static readonly ReadAtFn ReadAtCallback = OnReadAt;
        private static readonly CloseFn CloseCallback = OnClose;
        private static readonly ReleaseFn ReleaseCallback = OnRelease;
        internal static volatile Action<LogLevel, string> Heard;
        private static Func<ulong, ulong, IntPtr> hostAlloc;
        private static Action<IntPtr, ulong, ulong> hostFree;

        internal static void SetAllocator(Func<ulong, ulong, IntPtr> alloc, Action<IntPtr, ulong, ulong> free,
                                          ref Allocator allocator)
        {
            var alloced = hostAlloc;
            var freed = hostFree;
            hostAlloc = alloc;
            hostFree = free;
            var status = awqua_set_allocator(ref allocator);
            if (status < 0)
            {
                // Refused: the functions of an earlier call stay.
                hostAlloc = alloced;
                hostFree = freed;
            }
            Check(status);
        }

        [MonoPInvokeCallback(typeof(AllocFn))]
        private static IntPtr OnAlloc(IntPtr user, ulong size, ulong align)
        {
            try { return hostAlloc(size, align); }
            catch (Exception) { return IntPtr.Zero; }
        }

        [MonoPInvokeCallback(typeof(FreeFn))]
        private static void OnFree(IntPtr user, IntPtr memory, ulong size, ulong align)
        {
            try { hostFree(memory, size, align); }
            catch (Exception) { /* The memory stays where it is. */ }
        }

        [MonoPInvokeCallback(typeof(LogFn))]
        private static void OnLog(IntPtr user, uint level, Str text)
        {
            try { Heard?.Invoke((LogLevel)level, text.Text()); }
            catch (Exception) { }
        }

        [MonoPInvokeCallback(typeof(ParallelForFn))]
        private static void OnParallelFor(IntPtr user, uint count, IntPtr task, IntPtr context)
        {
            var jobs = (Jobs)GCHandle.FromIntPtr(user).Target;
            var call = (TaskFn)Marshal.GetDelegateForFunctionPointer(task, typeof(TaskFn));
            var next = -1;
            Action<int> body = worker =>
            {
                int index;
                while ((index = Interlocked.Increment(ref next)) < count) call(context, (uint)index, (uint)worker);
            };
            try { jobs.ParallelFor(jobs.Threads, body); }
            catch (Exception) { }
            // Whatever became of the host's threads: all of it is done when this returns.
            body(0);
        }

        [MonoPInvokeCallback(typeof(OpenFn))]
        private static int OnOpen(IntPtr user, Str name, out IntPtr file, out ulong size)
        {
            file = IntPtr.Zero;
            size = 0;
            Stream stream = null;
            try
            {
                var open = (Func<string, Stream>)GCHandle.FromIntPtr(user).Target;
                stream = open(name.Text());
                if (stream == null) return Empty;
                size = (ulong)stream.Length;
                file = GCHandle.ToIntPtr(GCHandle.Alloc(stream));
                return Ok;
            }
            catch (Exception)
            {
                // A stream that cannot say its length is nobody's from here on.
                stream?.Dispose();
                return ErrorIo;
            }
        }

        [MonoPInvokeCallback(typeof(ReadAtFn))]
        private static int OnReadAt(IntPtr user, IntPtr file, ulong offset, IntPtr buffer, ulong size)
        {
            try
            {
                var stream = (Stream)GCHandle.FromIntPtr(file).Target;
                // A stream has one position; several threads may load.
                lock (stream)
                {
                    stream.Position = (long)offset;
                    var piece = new byte[(int)Math.Min(size, 1 << 20)];
                    for (ulong done = 0; done < size;)
                    {
                        var n = stream.Read(piece, 0, (int)Math.Min(size - done, (ulong)piece.Length));
                        if (n <= 0) return ErrorIo;
                        Marshal.Copy(piece, 0, new IntPtr(buffer.ToInt64() + (long)done), n);
                        done += (ulong)n;
                    }
                }
                return Ok;
            }
            catch (Exception) { return ErrorIo; }
        }

        [MonoPInvokeCallback(typeof(CloseFn))]
        private static void OnClose(IntPtr user, IntPtr file)
        {
            try
            {
                var pin = GCHandle.FromIntPtr(file);
                ((Stream)pin.Target).Dispose();
                pin.Free();
            }
            catch (Exception) { }
        }

        [MonoPInvokeCallback(typeof(ReleaseFn))]
        private static void OnRelease(IntPtr user) => GCHandle.FromIntPtr(user).Free();

        internal static Io IoOf(Func<string, Stream> open) => new Io
        {
            StructSize = (uint)Marshal.SizeOf(typeof(Io)),
            User = GCHandle.ToIntPtr(GCHandle.Alloc(open)),
            Open = OpenCallback,
            ReadAt = ReadAtCallback,
            Close = CloseCallback,
            Release = ReleaseCallback,
        };


        [DllImport(Library)] private static extern IntPtr awqua_status_name(int status);
        [DllImport(Library)] private static extern int awqua_last_error(byte[] buffer, ulong capacity, out ulong length);
        [DllImport(Library)] private static extern int awqua_session_last_error(SessionHandle session, byte[] buffer, ulong capacity, out ulong length);
        [DllImport(Library)] internal static extern int awqua_engine_desc_init(ref EngineDesc desc);
        [DllImport(Library)] internal static extern int awqua_engine_create(ref EngineDesc desc, out EngineHandle engine);
        [DllImport(Library)] internal static extern int awqua_engine_free(IntPtr engine);
        [DllImport(Library)] internal static extern int awqua_model_desc_init(ref ModelDesc desc);
        [DllImport(Library)] internal static extern int awqua_model_create(EngineHandle engine, ref ModelDesc desc, out ModelHandle model);
        [DllImport(Library)] internal static extern int awqua_model_tick(ModelHandle model, ref Budget budget, ref LoadProgress progress);
        [DllImport(Library)] internal static extern int awqua_model_cancel(ModelHandle model);
        [DllImport(Library)] internal static extern int awqua_model_free(IntPtr model);
        [DllImport(Library)] private static extern int awqua_budget_init(ref Budget budget);
        [DllImport(Library)] private static extern int awqua_request_init(ref RequestDesc request);
        [DllImport(Library)] private static extern int awqua_set_allocator(ref Allocator allocator);
        [DllImport(Library)] internal static extern int awqua_set_log(LogFn callback, IntPtr user, uint level);
        [DllImport(Library)] internal static extern int awqua_engine_get_info(EngineHandle engine, ref EngineInfo info);
        [DllImport(Library)] internal static extern int awqua_model_estimate(ModelHandle model, ref SessionDesc desc, ref EstimateDesc estimate);
        [DllImport(Library)] internal static extern int awqua_batch_create(ModelHandle model, ref SessionDesc desc, uint sessions, out BatchHandle batch);
        [DllImport(Library)] internal static extern int awqua_batch_tick(BatchHandle batch, [In] IntPtr[] sessions, uint count, ref Budget budget, IntPtr results);
        [DllImport(Library)] internal static extern int awqua_batch_free(IntPtr batch);
        [DllImport(Library)] internal static extern int awqua_engine_recover(EngineHandle engine);
        [DllImport(Library)] internal static extern int awqua_engine_trim(EngineHandle engine, uint level);
        [DllImport(Library)] internal static extern int awqua_model_evict(ModelHandle model);
        [DllImport(Library)] internal static extern int awqua_model_restore(ModelHandle model);
        [DllImport(Library)] private static extern int awqua_session_desc_init(ref SessionDesc desc);
        [DllImport(Library)] internal static extern int awqua_session_create(ModelHandle model, ref SessionDesc desc, out SessionHandle session);
        [DllImport(Library)] internal static extern int awqua_session_fork(SessionHandle session, out SessionHandle forked);
        [DllImport(Library)] internal static extern int awqua_session_save(SessionHandle session, [Out] byte[] buffer, ulong capacity, out ulong length);
        [DllImport(Library)] internal static extern int awqua_session_restore(SessionHandle session, byte[] snapshot, ulong length);
        [DllImport(Library)] internal static extern int awqua_session_truncate(SessionHandle session, uint tokens);
        [DllImport(Library)] internal static extern int awqua_session_trim(SessionHandle session);
        [DllImport(Library)] internal static extern int awqua_session_begin_embedding_text(SessionHandle session, Str text);
        [DllImport(Library)] internal static extern int awqua_session_get_embedding(SessionHandle session, [Out] float[] values, ulong capacity, out ulong count);
        [DllImport(Library)] internal static extern int awqua_session_begin_text(SessionHandle session, Str prompt, ref RequestDesc request);
        [DllImport(Library)] internal static extern int awqua_session_begin_chat(SessionHandle session, [In] Message[] messages, ulong count, ref RequestDesc request);
        [DllImport(Library)] internal static extern int awqua_session_tick(SessionHandle session, ref Budget budget, IntPtr result);
        [DllImport(Library)] internal static extern int awqua_session_poll(SessionHandle session, ref Event e);
        [DllImport(Library)] internal static extern int awqua_session_cancel(SessionHandle session);
        [DllImport(Library)] internal static extern int awqua_session_free(IntPtr session);

        internal static int Check(int status)
        {
            if (status >= 0) return status;
            var text = new byte[512];
            awqua_last_error(text, (ulong)text.Length, out _);
            throw ErrorOf(status, text);
        }

        /// <summary>The failure that an answer of the session ended with.</summary>
        internal static AwquaException ErrorOf(int status, SessionHandle session)
        {
            var text = new byte[512];
            awqua_session_last_error(session, text, (ulong)text.Length, out _);
            return ErrorOf(status, text);
        }

        private static AwquaException ErrorOf(int status, byte[] text)
        {
            var end = Array.IndexOf(text, (byte)0);
            var name = Marshal.PtrToStringAnsi(awqua_status_name(status));
            return new AwquaException(status, name + ": " + Encoding.UTF8.GetString(text, 0, end));
        }

        internal static Budget BudgetOf(TimeSpan time)
        {
            var budget = new Budget { StructSize = (uint)Marshal.SizeOf(typeof(Budget)) };
            Check(awqua_budget_init(ref budget));
            budget.CpuUs = (ulong)Math.Max(0, time.Ticks / 10);
            return budget;
        }

        internal static SessionDesc SessionDescOf(SessionOptions how)
        {
            var desc = new SessionDesc { StructSize = (uint)Marshal.SizeOf(typeof(SessionDesc)) };
            Check(awqua_session_desc_init(ref desc));
            desc.Flags = (how.Deterministic ? 1u : 0) | (how.Exact ? 2u : 0) | (how.ShareForks ? 4u : 0);
            desc.Context = how.Context;
            desc.Chunk = how.Chunk;
            return desc;
        }

        internal static RequestDesc RequestOf(Request how, Utf8 grammar)
        {
            var request = new RequestDesc { StructSize = (uint)Marshal.SizeOf(typeof(RequestDesc)) };
            Check(awqua_request_init(ref request));
            request.Flags = how.IgnoreEos ? IgnoreEos : 0;
            request.MaxTokens = how.MaxTokens;
            request.Temperature = how.Temperature;
            request.TopK = how.TopK;
            request.TopP = how.TopP;
            request.Seed = how.Seed;
            request.GrammarKind = (uint)how.GrammarKind;
            if (how.GrammarKind != GrammarKind.None) request.Grammar = grammar.Str;
            return request;
        }
    }
}
