// The conversation, its settings and its errors. Stands behind tokens.js in the same script.

const ALTERNATIVES = 8;
const DEFAULTS = { system: "", temperature: "0.8", top_p: "1", top_k: "", max_tokens: "", seed: "" };

const composer = $("composer"), message = $("message"), panel = $("panel"), send = $("send");

/** What was said: {role, content}. The system prompt is put before it with each request. */
let history = [];
let model = null;
let abort = null; // AbortController of the running answer

// ---- Settings ----

function loadSettings() {
  let saved = {};
  try {
    saved = JSON.parse(localStorage.getItem("lalia.settings")) || {};
  } catch { /* storage is off, or holds something else: the defaults will do */ }
  for (const [name, value] of Object.entries(DEFAULTS)) $(name).value = saved[name] ?? value;
  $("show").checked = saved.show === true;
  settingsChanged();
}

function settingsChanged() {
  const values = Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, $(name).value]));
  for (const name of ["temperature", "top_p"]) $(name + "-value").textContent = Number(values[name]).toFixed(2);
  document.body.classList.toggle("show", $("show").checked);
  try {
    localStorage.setItem("lalia.settings", JSON.stringify({ ...values, show: $("show").checked }));
  } catch { /* storage is off */ }
}

function requestBody() {
  const system = $("system").value.trim();
  const body = {
    model: model.id,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...history],
    temperature: Number($("temperature").value),
    top_p: Number($("top_p").value),
    stream: true,
    stream_options: { include_usage: true },
    logprobs: true,
    top_logprobs: ALTERNATIVES,
  };
  for (const name of ["top_k", "max_tokens", "seed"]) if ($(name).value !== "") body[name] = Number($(name).value);
  return body;
}

function openPanel(open) {
  panel.hidden = !open;
  $("settings").setAttribute("aria-expanded", String(open));
  if (open) $("close").focus();
  else $("settings").focus();
}

// ---- Errors in plain words ----

function plainError(error) {
  const detail = error.message || String(error);
  if (error.code === "context_length_exceeded")
    return ["This conversation no longer fits the model's memory. Start a new one, or shorten the system prompt or max tokens.", detail];
  if (error.status === 503) return ["The server is busy or about to stop. Try again in a moment.", detail];
  if (error.status >= 500) return ["Something went wrong in the server.", detail];
  if (error.status) return ["The server did not accept this.", detail];
  if (error.code === "cut") return ["The connection broke before the answer was complete.", ""];
  return ["The server does not answer. Check that it is still running, then try again.", ""];
}

async function refusal(response) {
  const error = new Error("HTTP " + response.status);
  error.status = response.status;
  try {
    const body = (await response.json()).error;
    error.message = body.message;
    error.code = body.code;
  } catch { /* not from this server: the status says what there is to say */ }
  return error;
}

function showError(error) {
  const [text, detail] = plainError(error);
  if (error.status >= 400 && error.status < 500 && history.at(-1)?.role === "user") takeBack();
  const box = element("div", "turn error");
  box.setAttribute("role", "alert");
  box.append(element("p", "", text));
  if (detail) box.append(element("p", "detail", detail));
  if (!model) {
    const reload = element("button", "", "Try again");
    reload.type = "button";
    reload.addEventListener("click", () => location.reload());
    box.append(reload);
  } else if (history.at(-1)?.role === "user") {
    const again = element("button", "", "Try again");
    again.type = "button";
    again.addEventListener("click", () => {
      const broken = box.previousElementSibling;
      if (broken.classList.contains("answer")) broken.remove();
      box.remove();
      answer();
    });
    box.append(again);
  }
  conversation.append(box);
  follow(true);
}

/** Put the last message, which the server did not accept, back into its field. */
function takeBack() {
  const { content } = history.pop();
  [...conversation.querySelectorAll(".user")].at(-1).remove();
  if (!message.value) message.value = content;
  resize();
}

// ---- Conversation ----

let following = true;
scroller.addEventListener("scroll", () => {
  following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40;
});

function follow(always) {
  if (always || following) scroller.scrollTop = scroller.scrollHeight;
}

function setRunning(running) {
  send.classList.toggle("stop", running);
  send.setAttribute("aria-label", running ? "Stop" : "Send");
  send.title = running ? "Stop" : "Send";
  send.disabled = !running && (!message.value.trim() || !model);
}

/** The data of each server-sent event. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    buffer += value;
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

/** Ask for the answer to `history` and show it as it comes. */
async function answer() {
  const shown = new Answer();
  conversation.append(shown.node);
  abort = new AbortController();
  const mine = abort;
  setRunning(true);
  say("Answering");
  follow(true);
  let reason = null, complete = false, failure = null;
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(requestBody()),
      signal: mine.signal,
    });
    if (!response.ok) throw await refusal(response);
    for await (const data of events(response)) {
      if (data === "[DONE]") { complete = true; break; }
      const chunk = JSON.parse(data);
      if (chunk.error) throw Object.assign(new Error(chunk.error.message), { status: 500, code: chunk.error.code });
      const choice = chunk.choices[0];
      if (!choice) continue;
      shown.content += choice.delta.content ?? "";
      for (const entry of choice.logprobs?.content ?? []) shown.add(entry);
      reason = choice.finish_reason ?? reason;
      follow(false);
    }
    if (!complete) throw Object.assign(new Error(), { code: "cut" });
  } catch (error) {
    if (mine.signal.aborted) reason = "cancelled";
    else failure = error;
  }
  if (abort === mine) abort = null;
  if (!shown.node.isConnected) return; // a new conversation was begun meanwhile
  if (shown.content || !failure) {
    shown.finish(failure ? "interrupted" : reason);
    if (!failure) history.push({ role: "assistant", content: shown.content });
    say("Answer finished, " + shown.numTokens + " tokens");
  } else {
    shown.node.remove();
  }
  if (failure) showError(failure);
  setRunning(false);
  follow(false);
}

/** Answer the message before this answer once more. */
function again(node) {
  if (abort) return;
  const answers = [...conversation.querySelectorAll(".turn.user")];
  const asked = answers.filter((turn) => turn.compareDocumentPosition(node) & Node.DOCUMENT_POSITION_FOLLOWING).at(-1);
  while (asked.nextElementSibling) asked.nextElementSibling.remove();
  history = history.slice(0, asked.index + 1);
  answer();
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  if (abort) { abort.abort(); return; }
  const text = message.value.trim();
  if (!text || !model) return;
  if (!panelIsValid()) return;
  $("welcome").hidden = true;
  conversation.querySelectorAll(".error").forEach((box) => box.remove());
  const turn = element("div", "turn user", text);
  turn.index = history.length;
  history.push({ role: "user", content: text });
  conversation.append(turn);
  message.value = "";
  resize();
  answer();
});

function panelIsValid() {
  const wrong = panel.querySelector(":invalid");
  if (!wrong) return true;
  openPanel(true);
  wrong.reportValidity();
  return false;
}

function newConversation() {
  abort?.abort();
  abort = null;
  history = [];
  conversation.querySelectorAll(".turn").forEach((turn) => turn.remove());
  $("welcome").hidden = false;
  hideCard();
  setRunning(false);
  message.focus();
  say("New conversation");
}

function resize() {
  message.style.height = "auto";
  message.style.height = message.scrollHeight + "px";
  setRunning(abort !== null);
}

message.addEventListener("input", resize);
message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!abort) composer.requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (!card.hidden) hideCard();
  else if (!panel.hidden) openPanel(false);
});
$("new").addEventListener("click", newConversation);
$("settings").addEventListener("click", () => openPanel(panel.hidden));
$("close").addEventListener("click", () => openPanel(false));
$("reset").addEventListener("click", () => {
  for (const [name, value] of Object.entries(DEFAULTS)) $(name).value = value;
  settingsChanged();
});
panel.addEventListener("input", settingsChanged);
$("show").addEventListener("change", settingsChanged);

async function start() {
  loadSettings();
  try {
    const response = await fetch("/v1/models");
    if (!response.ok) throw await refusal(response);
    model = (await response.json()).data[0];
    $("model").textContent = model.id;
    $("max_tokens").max = model.max_model_len;
    document.title = model.id + " \u00b7 Lalia";
  } catch (error) {
    showError(error);
  }
  resize();
}

start();
