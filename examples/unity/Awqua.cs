// Awqua for C#: put this file and the native library (Plugins/libawqua.so, awqua.dll or libawqua.dylib) into a Unity
// project, or compile it with Mono or .NET. C# 7, no unsafe code.
using System;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using System.Text;

namespace Awqua
{
    public enum Backend : uint { Auto = 0, Cpu = 1, Gpu = 2, Cuda = 3 }

    public enum GrammarKind : uint { None = 0, JsonSchema = 1, Regex = 2, Lark = 3 }

    public enum Trim : uint { Pages = 0, Sessions = 1, Weights = 2 }

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
        public bool Deterministic, Exact;
    }

    /// <summary>Where models run.</summary>
    public sealed class Engine : IDisposable
    {
        internal readonly EngineHandle Handle;

        public Engine(Backend backend = Backend.Auto)
        {
            var desc = new Native.EngineDesc { StructSize = (uint)Marshal.SizeOf(typeof(Native.EngineDesc)) };
            Native.Check(Native.awqua_engine_desc_init(ref desc));
            desc.Backend = (uint)backend;
            Native.Check(Native.awqua_engine_create(ref desc, out Handle));
        }

        /// <summary>Lets go of a lost device; models and sessions find another one in their next ticks.</summary>
        public void Recover() => Native.Check(Native.awqua_engine_recover(Handle));

        /// <summary>Asks all sessions to give memory back in their next ticks.</summary>
        public void Trim(Trim level) => Native.Check(Native.awqua_engine_trim(Handle, (uint)level));

        public void Dispose() => Handle.Dispose();
    }

    /// <summary>Weights on a device with a tokenizer. Tick it until it is ready.</summary>
    public sealed class Model : IDisposable
    {
        internal readonly ModelHandle Handle;

        public Model(Engine engine, string path)
        {
            var text = new Utf8(path);
            try
            {
                var desc = new Native.ModelDesc { StructSize = (uint)Marshal.SizeOf(typeof(Native.ModelDesc)) };
                Native.Check(Native.awqua_model_desc_init(ref desc));
                desc.Path = text.Str;
                Native.Check(Native.awqua_model_create(engine.Handle, ref desc, out Handle));
            }
            finally { text.Free(); }
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
        private readonly SessionHandle handle;
        private byte[] buffer = new byte[256];

        public Session(Model model, SessionOptions options = null)
        {
            var how = options ?? new SessionOptions();
            var desc = new Native.SessionDesc { StructSize = (uint)Marshal.SizeOf(typeof(Native.SessionDesc)) };
            Native.Check(Native.awqua_session_desc_init(ref desc));
            desc.Flags = (how.Deterministic ? 1u : 0) | (how.Exact ? 2u : 0);
            desc.Context = how.Context;
            desc.Chunk = how.Chunk;
            Native.Check(Native.awqua_session_create(model.Handle, ref desc, out handle));
        }

        private Session(SessionHandle handle) { this.handle = handle; }

        /// <summary>Begins to continue a text.</summary>
        public void Begin(string prompt, Request how = null)
        {
            Utf8 text = new Utf8(prompt), grammar = new Utf8(how?.Grammar ?? "");
            try
            {
                var request = Native.RequestOf(how ?? new Request(), grammar);
                Native.Check(Native.awqua_session_begin_text(handle, text.Str, ref request));
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
                Native.Check(Native.awqua_session_begin_chat(handle, messages, (ulong)messages.Length, ref request));
            }
            finally { texts.ForEach(text => text.Free()); grammar.Free(); }
        }

        /// <summary>Works for about the given time; true while there is more to do.</summary>
        public bool Tick(TimeSpan time)
        {
            var budget = Native.BudgetOf(time);
            return Native.Check(Native.awqua_session_tick(handle, ref budget, IntPtr.Zero)) == Native.Pending;
        }

        /// <summary>Appends new text to <paramref name="to"/>; the reason if the answer ended, else None.</summary>
        public StopReason Poll(StringBuilder to)
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
                    if (Native.Check(Native.awqua_session_poll(handle, ref e)) == Native.Empty) return StopReason.None;
                    if (e.Kind == Native.EventText) to.Append(Encoding.UTF8.GetString(buffer, 0, (int)e.TextLen));
                    else if (e.Kind == Native.EventDone) return (StopReason)e.Reason;
                    else if (e.Kind == Native.EventError) Native.Check(e.Status);
                }
            }
            finally { pin.Free(); }
        }

        /// <summary>A session that holds what this one does, without computing it again.</summary>
        public Session Fork()
        {
            Native.Check(Native.awqua_session_fork(handle, out var forked));
            return new Session(forked);
        }

        /// <summary>What the session holds, for Restore in this run or a later one.</summary>
        public byte[] Save()
        {
            var status = Native.awqua_session_save(handle, null, 0, out var length);
            if (status != Native.BufferTooSmall) Native.Check(status);
            var bytes = new byte[length];
            Native.Check(Native.awqua_session_save(handle, bytes, length, out _));
            return bytes;
        }

        public void Restore(byte[] snapshot) =>
            Native.Check(Native.awqua_session_restore(handle, snapshot, (ulong)snapshot.Length));

        /// <summary>Forgets all but the first tokens.</summary>
        public void Truncate(uint tokens) => Native.Check(Native.awqua_session_truncate(handle, tokens));

        /// <summary>Gives the memory of an idle session back; it is computed again when it is needed.</summary>
        public void Trim() => Native.Check(Native.awqua_session_trim(handle));

        /// <summary>Begins to embed a text; Tick to its end, then Embedding has the vector.</summary>
        public void BeginEmbedding(string text)
        {
            var bytes = new Utf8(text);
            try { Native.Check(Native.awqua_session_begin_embedding_text(handle, bytes.Str)); }
            finally { bytes.Free(); }
        }

        public float[] Embedding()
        {
            var status = Native.awqua_session_get_embedding(handle, null, 0, out var count);
            if (status != Native.BufferTooSmall) Native.Check(status);
            var values = new float[count];
            Native.Check(Native.awqua_session_get_embedding(handle, values, count, out _));
            return values;
        }

        /// <summary>Ends the answer at the next tick. Any thread, any time.</summary>
        public void Cancel() => Native.Check(Native.awqua_session_cancel(handle));

        public void Dispose() => handle.Dispose();
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

    internal static class Native
    {
#if UNITY_IOS && !UNITY_EDITOR
        private const string Library = "__Internal";
#else
        private const string Library = "awqua";
#endif
        internal const int Ok = 0, Pending = 1, Empty = 2, BufferTooSmall = -3;
        internal const uint EventText = 1, EventDone = 2, EventError = 3;
        private const uint IgnoreEos = 1;

        [StructLayout(LayoutKind.Sequential)]
        internal struct Str { internal IntPtr Data; internal ulong Len; }

        [StructLayout(LayoutKind.Sequential)]
        internal struct EngineDesc { internal uint StructSize, Flags, Backend, Threads; internal Str Device; }

        [StructLayout(LayoutKind.Sequential)]
        internal struct ModelDesc { internal uint StructSize, Flags; internal Str Path; }

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
        }

        [DllImport(Library)] private static extern IntPtr awqua_status_name(int status);
        [DllImport(Library)] private static extern int awqua_last_error(byte[] buffer, ulong capacity, out ulong length);
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
        [DllImport(Library)] internal static extern int awqua_engine_recover(EngineHandle engine);
        [DllImport(Library)] internal static extern int awqua_engine_trim(EngineHandle engine, uint level);
        [DllImport(Library)] internal static extern int awqua_model_evict(ModelHandle model);
        [DllImport(Library)] internal static extern int awqua_model_restore(ModelHandle model);
        [DllImport(Library)] internal static extern int awqua_session_desc_init(ref SessionDesc desc);
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
            var end = Array.IndexOf(text, (byte)0);
            var name = Marshal.PtrToStringAnsi(awqua_status_name(status));
            throw new AwquaException(status, name + ": " + Encoding.UTF8.GetString(text, 0, end));
        }

        internal static Budget BudgetOf(TimeSpan time)
        {
            var budget = new Budget { StructSize = (uint)Marshal.SizeOf(typeof(Budget)) };
            Check(awqua_budget_init(ref budget));
            budget.CpuUs = (ulong)Math.Max(0, time.Ticks / 10);
            return budget;
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
