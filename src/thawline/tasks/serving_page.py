"""The page of `thawline serve`: upload a recording, or speak and read along. No other file is fetched."""

from __future__ import annotations

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>thawline serve</title>
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 44rem; margin: 2rem auto; padding: 0 1rem }
section { border: 1px solid #8886; border-radius: .5rem; padding: 1rem; margin: 1rem 0 }
button { font: inherit; padding: .3rem .9rem }
output { display: block; min-height: 3rem; margin-top: .8rem; white-space: pre-wrap }
.partial { opacity: .6 } .error { color: #c22 }
</style>
<h1>Speech to text</h1>
<section><h2>A recording</h2>
<input id="file" type="file" accept="audio/*,video/*" aria-label="recording">
<button id="send">Transcribe</button><output id="whole"></output></section>
<section><h2>Live</h2>
<button id="speak">Speak</button> <button id="stop" disabled>Stop</button><output id="live"></output></section>
<script>
"use strict";
const at = id => document.getElementById(id);
function show(place, text, kind) { at(place).textContent = text; at(place).className = kind || ""; }

at("send").onclick = async () => {
  const file = at("file").files[0];
  if (!file) { show("whole", "Choose a file first.", "error"); return; }
  const form = new FormData();
  form.append("file", file);
  show("whole", "\\u2026", "partial");
  try {
    const answer = await fetch("v1/audio/transcriptions", {method: "POST", body: form});
    const found = await answer.json();
    if (answer.ok) show("whole", found.text || "(nothing heard)");
    else show("whole", found.error.message, "error");
  } catch (problem) { show("whole", String(problem), "error"); }
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
