// A character that talks, as a component: put it on an object, name the model's folder below StreamingAssets, call Say.
#if UNITY_5_3_OR_NEWER
using System;
using System.IO;
using System.Text;
using UnityEngine;

namespace Awqua
{
    public sealed class Speaker : MonoBehaviour
    {
        public string modelFolder = "model";
        [Range(0.5f, 8f)] public float millisecondsPerFrame = 2f;
        public event Action<string> Saying;
        public event Action<string> Said;

        private Engine engine;
        private Model model;
        private Session session;
        private string next;
        private bool answering;
        private readonly StringBuilder text = new StringBuilder();

        private void Awake()
        {
            engine = new Engine();
            model = new Model(engine, Path.Combine(Application.streamingAssetsPath, modelFolder));
        }

        public void Say(string prompt) => next = prompt;

        private void Update()
        {
            var time = TimeSpan.FromMilliseconds(millisecondsPerFrame);
            if (session == null)
            {
                if (model.Tick(time, out _)) session = new Session(model);
                return;
            }
            if (!answering && next != null)
            {
                text.Clear();
                session.Begin(next);
                next = null;
                answering = true;
            }
            if (!answering) return;
            session.Tick(time);
            var before = text.Length;
            answering = session.Poll(text) == StopReason.None;
            if (text.Length > before) Saying?.Invoke(text.ToString());
            if (!answering) Said?.Invoke(text.ToString());
        }

        private void OnDestroy()
        {
            session?.Dispose();
            model?.Dispose();
            engine?.Dispose();
        }
    }
}
#endif
