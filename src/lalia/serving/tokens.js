"use strict";

// The tokens of an answer, and the card that shows what else the model weighed in their place. Stands before page.js
// in the same script. Everything a model or a person wrote enters the page as text nodes; nothing here parses HTML.

const FULL_TINT_BITS = 10; // a token of probability 1/1024 or less gets the strongest tint

const $ = (id) => document.getElementById(id);
const conversation = $("conversation"), scroller = $("scroller"), card = $("card");

function element(name, className, text) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function icon(path) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 20 20");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}

function say(text) {
  $("status").textContent = text;
}

// ---- Tokens ----

const probability = (entry) => Math.exp(entry.logprob);
const bits = (entry) => Math.max(0, -entry.logprob / Math.LN2);

function percent(p) {
  if (p >= 0.9995) return "100%";
  if (p >= 0.1) return (p * 100).toFixed(0) + "%";
  return p >= 0.001 ? (p * 100).toFixed(1) + "%" : "<0.1%";
}

/** A token's text with its white space made visible. */
function visible(entry) {
  if (entry.token.startsWith("bytes:")) return entry.token.slice(6).replaceAll("\\x", " ").trim().toUpperCase();
  return entry.token.replaceAll(" ", "\u2423").replaceAll("\n", "\u21b5").replaceAll("\r", "\u240d").replaceAll("\t", "\u21e5");
}

/** Whether UTF-8 bytes end in the middle of a character. */
function endsInside(bytes) {
  for (let back = 1; back <= Math.min(3, bytes.length); back++) {
    const byte = bytes[bytes.length - back];
    if (byte >= 0xc0) return (byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : 2) > back;
    if (byte < 0x80) return false;
  }
  return false;
}

/** The text of one answer, in which every piece knows the tokens it came from. */
class Answer {
  constructor() {
    this.node = element("article", "turn answer running");
    this.node.setAttribute("aria-label", "Answer");
    this.node.setAttribute("aria-busy", "true");
    this.text = element("div", "text-of-answer");
    this.node.append(this.text);
    this.content = "";
    this.numTokens = 0;
    this.decoder = new TextDecoder();
    this.pending = []; // tokens with bytes of a character that is not complete
    this.active = -1;
  }

  add(entry) {
    this.numTokens += 1;
    const now = performance.now();
    this.started ??= now;
    this.latest = now;
    this.pending.push(entry);
    const isSpecial = entry.bytes === null;
    const text = isSpecial ? "end" : this.decoder.decode(new Uint8Array(entry.bytes), { stream: true });
    if (!text) return;
    this.place(text, isSpecial ? "token end" : "token");
    if (!isSpecial && endsInside(entry.bytes)) this.pending.push(entry);
  }

  place(text, className) {
    const span = element("span", className, text);
    // Several tokens may make up one character: the least expected of them is the one worth seeing.
    span.entry = this.pending.reduce((a, b) => (b.logprob < a.logprob ? b : a));
    span.parts = this.pending.length;
    this.pending = [];
    span.style.setProperty("--surprise", Math.min(1, bits(span.entry) / FULL_TINT_BITS).toFixed(3));
    this.text.append(span);
  }

  finish(reason) {
    const rest = this.decoder.decode();
    if (rest && this.pending.length) this.place(rest, "token");
    const shown = [...this.text.children].filter((span) => !span.classList.contains("end")).map((span) => span.textContent).join("");
    if (shown !== this.content) this.text.textContent = this.content; // what the server calls the answer is the answer
    this.node.classList.remove("running");
    this.node.removeAttribute("aria-busy");
    if (this.text.children.length) {
      this.text.tabIndex = 0;
      this.text.setAttribute("role", "group");
      this.text.setAttribute("aria-label", "Answer; the arrow keys step through its tokens");
    }
    this.node.append(this.facts(reason));
  }

  speed() {
    const seconds = (this.latest - this.started) / 1000;
    return this.numTokens > 1 && seconds > 0 ? (this.numTokens - 1) / seconds : null;
  }

  facts(reason) {
    const line = element("div", "facts");
    const tools = element("div", "tools");
    tools.append(
      tool("Copy", "M7.5 7.5V4.75A1.25 1.25 0 0 1 8.75 3.5h6.5a1.25 1.25 0 0 1 1.25 1.25v6.5a1.25 1.25 0 0 1-1.25 1.25H12.5M4.75 7.5h6.5a1.25 1.25 0 0 1 1.25 1.25v6.5a1.25 1.25 0 0 1-1.25 1.25h-6.5a1.25 1.25 0 0 1-1.25-1.25v-6.5A1.25 1.25 0 0 1 4.75 7.5Z", (button) => copy(this.content, button)),
      tool("Again", "M15.5 6.5A6.5 6.5 0 1 0 16.5 10M16 3.25V6.75H12.5", () => again(this.node)),
    );
    line.append(tools, element("span", "", this.numTokens === 1 ? "1 token" : this.numTokens + " tokens"));
    const speed = this.speed();
    if (speed) line.append(element("span", "speed", (speed < 10 ? speed.toFixed(1) : Math.round(speed)) + " tokens/s"));
    const words = {
      stop: "complete",
      length: "cut off at the token limit",
      cancelled: "stopped by you",
    };
    const finish = element("span", "finish" + (reason === "stop" ? "" : " notable"), words[reason] || reason);
    finish.title = "finish reason: " + reason;
    line.append(finish);
    return line;
  }
}

function tool(name, path, act) {
  const button = element("button", "small");
  button.type = "button";
  button.append(icon(path), element("span", "", name));
  button.addEventListener("click", () => act(button));
  return button;
}

async function copy(text, button) {
  const label = button.querySelector("span");
  try {
    await navigator.clipboard.writeText(text);
    label.textContent = "Copied";
  } catch {
    label.textContent = "Not allowed"; // browsers give the clipboard to https and localhost only
  }
  say(label.textContent);
  setTimeout(() => { label.textContent = "Copy"; }, 1500);
}

// ---- The card of alternatives ----

function row(className, what, share) {
  const line = element("li", className);
  const bar = element("span", "bar");
  const fill = element("i");
  fill.style.width = Math.min(100, share * 100).toFixed(2) + "%";
  bar.append(fill);
  line.append(element("span", "what", what), bar, element("span", "share", percent(share)));
  line.dataset.share = share;
  return line;
}

function showCard(span) {
  const { entry, parts } = span;
  const likeliest = [...entry.top_logprobs];
  const isChosen = (other) => other.token === entry.token;
  if (!likeliest.some(isChosen)) likeliest.push(entry);
  const list = element("ol");
  for (const other of likeliest) list.append(row(isChosen(other) ? "chosen" : "", visible(other), probability(other)));
  const rest = 1 - likeliest.reduce((sum, other) => sum + probability(other), 0);
  if (rest > 0.0005) list.append(row("rest", "all others", rest));
  const head = element("div", "head");
  head.append(element("span", "name", visible(entry)), element("span", "bits", bits(entry).toFixed(1) + " bits of surprise"));
  const note = parts > 1 ? "One character made of " + parts + " tokens; this is the least expected." : "What the model held likely here, before sampling.";
  card.replaceChildren(head, list, element("p", "", note));
  card.hidden = false;

  document.querySelector(".token.active")?.classList.remove("active");
  span.classList.add("active");
  const place = span.getClientRects()[0], size = card.getBoundingClientRect();
  const left = Math.max(12, Math.min(place.left + place.width / 2 - 48, innerWidth - size.width - 12));
  const above = place.top - size.height - 8;
  card.style.left = left + "px";
  card.style.top = (above > 8 ? above : Math.min(place.bottom + 8, innerHeight - size.height - 8)) + "px";
}

function hideCard() {
  card.hidden = true;
  document.querySelector(".token.active")?.classList.remove("active");
}

function tellCard(span) {
  const others = span.entry.top_logprobs.slice(0, 4).map((other) => other.token + " " + percent(probability(other)));
  say(span.textContent + ": " + percent(probability(span.entry)) + ". Likeliest: " + others.join(", "));
}

const tokenAt = (event) => (event.target instanceof Element ? event.target.closest(".token") : null);

conversation.addEventListener("pointerover", (event) => {
  if (event.pointerType !== "touch" && tokenAt(event)) showCard(tokenAt(event));
});
conversation.addEventListener("pointerout", (event) => {
  if (event.pointerType !== "touch" && tokenAt(event)) hideCard();
});
document.addEventListener("click", (event) => {
  const span = tokenAt(event);
  if (span) showCard(span);
  else hideCard();
});
scroller.addEventListener("scroll", hideCard);

conversation.addEventListener("focusin", (event) => {
  if (event.target.matches(".text-of-answer:focus-visible")) step(event.target, 0);
});
conversation.addEventListener("focusout", hideCard);
conversation.addEventListener("keydown", (event) => {
  if (!event.target.matches(".text-of-answer") || event.ctrlKey || event.metaKey || event.altKey) return;
  const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
  if (!(event.key in steps)) return;
  event.preventDefault();
  step(event.target, steps[event.key]);
});

function step(text, by) {
  const spans = [...text.querySelectorAll(".token")].filter((span) => span.getClientRects().length);
  if (!spans.length) return;
  const to = Math.max(0, Math.min(spans.length - 1, (text.place ?? 0) + by));
  text.place = to;
  spans[to].scrollIntoView({ block: "nearest" });
  showCard(spans[to]);
  tellCard(spans[to]);
}
