// The same calls without Unity: mcs Awqua.cs Program.cs -out:npc.exe && mono npc.exe MODEL_FOLDER
using System;
using System.Text;
using System.Threading;

namespace Awqua
{
    internal static class Program
    {
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
                }
                try
                {
                    new Model(new Engine(Backend.Cpu), "/nowhere").Tick(time, out _);
                    return 1;
                }
                catch (AwquaException e) { Console.WriteLine("as expected: " + e.Message); }
                return 0;
            }
            catch (AwquaException e)
            {
                Console.Error.WriteLine(e.Message);
                return 1;
            }
        }
    }
}
