// The same calls without Unity: mcs Awqua.cs Native.cs Program.cs -out:npc.exe && mono npc.exe MODEL_FOLDER
using System;
using System.IO;
using System.Runtime.InteropServices;
using System.Text;
using System.Threading;
using System.Threading.Tasks;

namespace Awqua
{
    internal static class Program
    {
        private static long held, taken;

        // Memory of the program's own, which it counts.
        private static IntPtr Alloc(ulong size, ulong align)
        {
            var all = Marshal.AllocHGlobal(new IntPtr((long)(size + align) + IntPtr.Size));
            var address = (all.ToInt64() + IntPtr.Size + (long)align - 1) / (long)align * (long)align;
            Marshal.WriteIntPtr(new IntPtr(address - IntPtr.Size), all);
            Interlocked.Add(ref held, (long)size);
            Interlocked.Increment(ref taken);
            return new IntPtr(address);
        }

        private static void Free(IntPtr memory, ulong size, ulong align)
        {
            Interlocked.Add(ref held, -(long)size);
            Marshal.FreeHGlobal(Marshal.ReadIntPtr(memory, -IntPtr.Size));
        }

        // Two characters on one start, a saved game, weights that go and come back, and what texts are like.
        private static bool Remember(Model model, TimeSpan time)
        {
            var options = new SessionOptions { Context = 128, Deterministic = true, Exact = true };
            var request = new Request { MaxTokens = 8, Temperature = 0, IgnoreEos = true };
            var prompt = "It was a fine morning, and Emma walked along the river.";
            using (var first = new Session(model, options))
            {
                var said = Answer(first, prompt, request, time);
                using (var second = first.Fork())
                {
                    if (Answer(second, prompt, request, time) != said) return false;
                    var saved = second.Save();
                    second.Truncate(0);
                    second.Trim();
                    second.Restore(saved);
                    model.Evict();
                    model.Restore();
                    while (!model.Tick(time, out _)) { }
                    if (Answer(second, prompt, request, time) != said) return false;
                }
                float[] cat = Embed(first, "The grey cat slept.", time), dog = Embed(first, "The old mill stood still.", time);
                var same = Embed(first, "The grey cat slept.", time);
                Console.WriteLine("remembered:" + said + ", embedded " + cat.Length + " numbers");
                return said.Length > 0 && Distance(cat, same) == 0 && Distance(cat, dog) > 0;
            }
        }

        // A checkpoint from the program's own streams on the program's own threads, two characters in one pass, and what
        // is known of memory before and after.
        private static bool Host(string folder, TimeSpan time)
        {
            int messages = 0, opened = 0, jobs = 0;
            Engine.SetLog((level, text) => Interlocked.Increment(ref messages), LogLevel.Debug);
            var how = new EngineOptions
            {
                Backend = Backend.Cpu,
                Threads = 2,
                ParallelFor = (n, body) =>
                {
                    Interlocked.Increment(ref jobs);
                    Parallel.For(0, n, body);
                },
            };
            Func<string, Stream> open = name =>
            {
                opened++;
                var path = Path.Combine(folder, name);
                return File.Exists(path) ? File.OpenRead(path) : null;
            };
            var options = new SessionOptions { Context = 64 };
            var request = new Request { MaxTokens = 8, Temperature = 0, IgnoreEos = true };
            using (var engine = new Engine(how))
            using (var model = new Model(engine, "the game's files", open))
            {
                var estimate = model.Estimate(options);
                while (!model.Tick(time, out _)) { }
                engine.Used(out var host, out var device);
                if (host != estimate.WeightsHost || device != 0 || estimate.SessionHost == 0) return false;
                using (var batch = new Batch(model, 2, options))
                using (var first = new Session(model, options))
                using (var second = new Session(model, options))
                {
                    first.Begin("Emma said,", request);
                    second.Begin("The grey cat", request);
                    while (batch.Tick(new[] { first, second }, time)) { }
                    uint computed = 0;
                    var text = new StringBuilder();
                    if (first.Poll(text, (kind, done, total) => computed = done) != StopReason.MaxTokens) return false;
                    if (second.Poll(text) != StopReason.MaxTokens || text.Length == 0 || computed == 0) return false;
                }
            }
            Engine.SetLog(null);
            Console.WriteLine("hosted: " + opened + " files, " + (jobs > 0 ? "jobs" : "no jobs") + ", " +
                              (messages > 0 ? "messages" : "no messages"));
            return opened > 2 && jobs > 0;
        }

        private static string Answer(Session session, string prompt, Request request, TimeSpan time)
        {
            var text = new StringBuilder();
            session.Begin(prompt, request);
            while (session.Tick(time)) { }
            return session.Poll(text) == StopReason.MaxTokens ? text.ToString() : "";
        }

        private static float[] Embed(Session session, string text, TimeSpan time)
        {
            session.BeginEmbedding(text);
            while (session.Tick(time)) { }
            session.Poll(new StringBuilder());
            return session.Embedding();
        }

        private static double Distance(float[] a, float[] b)
        {
            double sum = 0;
            for (var i = 0; i < a.Length; i++) sum += Math.Abs(a[i] - b[i]);
            return sum;
        }

        private static int Main(string[] arguments)
        {
            if (arguments.Length != 1)
            {
                Console.Error.WriteLine("usage: npc.exe MODEL_FOLDER");
                return 2;
            }
            var time = TimeSpan.FromMilliseconds(2);
            try
            {
                Engine.SetAllocator(Alloc, Free);
                using (var engine = new Engine(Backend.Cpu))
                using (var model = new Model(engine, arguments[0]))
                {
                    var frames = 1;
                    while (!model.Tick(time, out _)) frames++;
                    Console.WriteLine("loaded in " + frames + " frames");
                    using (var session = new Session(model))
                    {
                        var text = new StringBuilder();
                        session.Begin("The old miller said,", new Request { MaxTokens = 32, Seed = 3 });
                        while (session.Tick(time)) Thread.Sleep(1);
                        var reason = session.Poll(text);
                        Console.WriteLine("The old miller said," + text + " [" + reason + "]");
                        if (text.Length == 0 || reason == StopReason.None) return 1;
                    }
                    if (!Remember(model, time)) return 1;
                }
                if (!Host(arguments[0], time)) return 1;
                try
                {
                    using (var engine = new Engine(Backend.Cpu))
                    using (var model = new Model(engine, "/nowhere")) model.Tick(time, out _);
                    return 1;
                }
                catch (AwquaException e) { Console.WriteLine("as expected: " + e.Message); }
                try
                {
                    Engine.SetAllocator(Alloc, Free);
                    return 1;
                }
                catch (AwquaException e) { Console.WriteLine("as expected: " + e.Message); }
                // What is left are tables that the library makes once.
                Console.WriteLine("memory: taken " + (taken > 1000 ? "often" : "seldom") + ", " + held + " bytes left");
                return taken > 1000 && held < 1 << 20 ? 0 : 1;
            }
            catch (AwquaException e)
            {
                Console.Error.WriteLine(e.Message);
                return 1;
            }
        }
    }
}
