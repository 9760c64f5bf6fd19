"""The pages of `thawline serve`: upload a recording or speak, or upload a video and ask. No other file is fetched."""

from __future__ import annotations

_HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>thawline serve</title>
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 44rem; margin: 2rem auto; padding: 0 1rem }
section { border: 1px solid #8886; border-radius: .5rem; padding: 1rem; margin: 1rem 0 }
button, input[type=text] { font: inherit; padding: .3rem .9rem }
form { display: flex; gap: .5rem; margin-top: .8rem } input[type=text] { flex: 1 }
video:not([hidden]) { display: block; max-width: 100%; max-height: 20rem; margin-top: .8rem }
output, dd { display: block; min-height: 3rem; margin-top: .8rem; white-space: pre-wrap }
dt { font-weight: 600; margin-top: 1rem } dd { margin: .2rem 0 0; min-height: 1.5rem }
.partial { opacity: .6 } .error { color: #c22 }
</style>
"""
_SCRIPT = """<script>
"use strict";
const at = id => document.getElementById(id);
function mark(place, text, kind) { place.textContent = text; place.className = kind || ""; }
function show(id, text, kind) { mark(at(id), text, kind); }
async function upload(url, file) {
  const form = new FormData();
  form.append("file", file);
  const answer = await fetch(url, {method: "POST", body: form});
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error.message);
  return found;
}
"""

SPEECH_PAGE = (
    _HEAD
    + """<h1>Speech to text</h1>
<section><h2>A recording</h2>
<input id="file" type="file" accept="audio/*,video/*" aria-label="recording">
<button id="send">Transcribe</button><output id="whole"></output></section>
<section><h2>Live</h2>
<button id="speak">Speak</button> <button id="stop" disabled>Stop</button><output id="live"></output></section>
"""
    + _SCRIPT
    + """
at("send").onclick = async () => {
  const file = at("file").files[0];
  if (!file) { show("whole", "Choose a file first.", "error"); return; }
  show("whole", "\\u2026", "partial");
  try { show("whole", (await upload("v1/audio/transcriptions", file)).text || "(nothing heard)"); }
  catch (problem) { show("whole", problem.message, "error"); }
};

const worklet = `registerProcessor("tap", class extends AudioWorkletProcessor {
  process(inputs) { if (inputs[0].length) this.port.postMessage(inputs[0][0].slice()); return true; } })`;
let stop = null;
at("speak").onclick = async () => {
  show("live", "\\u2026", "partial");
  let media, context;
  try {
    media = await navigator.mediaDevices.getUserMedia({audio: {channelCount: 1}});
    context = new AudioContext();
    await context.audioWorklet.addModule(URL.createObjectURL(new Blob([worklet], {type: "text/javascript"})));
  } catch (problem) { show("live", "No microphone: " + problem.message, "error"); return; }
  const url = new URL("v1/audio/stream?rate=" + context.sampleRate, location.href);
  url.protocol = url.protocol.replace("http", "ws");
  const socket = new WebSocket(url);
  const tap = new AudioWorkletNode(context, "tap");
  let held = [], count = 0;
  const flush = () => {
    const samples = new Int16Array(count);
    let n = 0;
    for (const piece of held) for (const x of piece) samples[n++] = Math.max(-1, Math.min(1, x)) * 32767;
    held = []; count = 0;
    if (socket.readyState === 1 && samples.length) socket.send(samples);
  };
  tap.port.onmessage = message => {
    held.push(message.data); count += message.data.length;
    if (count > context.sampleRate / 5) flush();
  };
  context.createMediaStreamSource(media).connect(tap);
  const end = () => { media.getTracks().forEach(t => t.stop()); context.close();
                      at("speak").disabled = false; at("stop").disabled = true; };
  stop = () => { flush(); socket.send("end"); end(); };
  socket.onmessage = message => {
    const found = JSON.parse(message.data);
    if (found.type === "error") { show("live", found.message, "error"); end(); }
    else show("live", found.text || (found.type === "final" ? "(nothing heard)" : "\\u2026"),
              found.type === "partial" ? "partial" : "final");
  };
  socket.onerror = () => { show("live", "The connection was refused.", "error"); end(); };
  at("speak").disabled = true; at("stop").disabled = false;
};
at("stop").onclick = () => stop && stop();
</script></html>
"""
)

VIDEO_PAGE = (
    _HEAD
    + """<h1>Ask about a video</h1>
<section><h2>The video</h2>
<input id="file" type="file" accept="video/*,image/*" aria-label="video or image">
<video id="shown" controls muted hidden></video><output id="seen"></output></section>
<section><h2>Questions</h2>
<dl id="talk"></dl>
<form id="ask"><input id="question" type="text" autocomplete="off" aria-label="question" disabled>
<button id="send" disabled>Ask</button></form></section>
"""
    + _SCRIPT
    + """
let name = null;
function ready(yes) { at("question").disabled = at("send").disabled = !yes; if (yes) at("question").focus(); }

at("file").onchange = async () => {
  const file = at("file").files[0];
  if (!file) return;
  name = null; ready(false); at("talk").replaceChildren();
  at("shown").hidden = !file.type.startsWith("video/");
  at("shown").src = URL.createObjectURL(file);
  show("seen", "\\u2026", "partial");
  try {
    const found = await upload("v1/videos", file);
    name = found.id;
    show("seen", found.kind === "image" ? "The image is seen." : found.frames + " frames are seen.");
    ready(true);
  } catch (problem) { show("seen", problem.message, "error"); }
};

at("ask").onsubmit = async event => {
  event.preventDefault();
  const question = at("question").value.trim();
  if (!question || !name) return;
  const asked = document.createElement("dt"), told = document.createElement("dd");
  asked.textContent = question;
  at("talk").append(asked, told);
  mark(told, "\\u2026", "partial"); ready(false); at("question").value = "";
  try {
    const answer = await fetch("v1/videos/" + name + "/ask", {method: "POST",
      headers: {"Content-Type": "application/json"}, body: JSON.stringify({question})});
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", text = "";
    for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
      const lines = (rest + piece.value).split("\\n");
      rest = lines.pop();
      for (const line of lines) {
        const found = JSON.parse(line);
        if (found.type === "error") throw new Error(found.message);
        text = found.type === "final" ? found.text : text + found.text;
        mark(told, text || "(no words)", found.type === "final" ? "final" : "partial");
      }
    }
  } catch (problem) { mark(told, problem.message, "error"); }
  ready(true);
};
</script></html>
"""
)
