// The review page: one answer after the other, labelled with the keyboard.

import { getJson, sendLabel } from "./api.js";
import { $, element } from "./dom.js";
import { keyDialog, refused, trouble } from "./trouble.js";
import { percent } from "./words.js";

const KEYS = { r: true, w: false, u: null };
const WORDS = new Map([[true, "right"], [false, "wrong"], [null, "cannot tell"]]);

let items = [];
let busy = false;
const later = new Set(); // put off until the page is loaded anew

const name = (item) => `${item.id} ${item.index}`;
const kind = () => document.querySelector("input[name=kind]:checked").value;

async function load() {
  trouble(null);
  try {
    const queue = await getJson(`v1/reliability/queue?kind=${kind()}&limit=200`);
    $("served").textContent = `reviewing as ${queue.reviewer}`;
    items = queue.items.filter((item) => !later.has(name(item)));
    for (const [one, count] of Object.entries(queue.waiting)) $(`waiting-${one}`).textContent = count;
    $("agreement").replaceChildren(...queue.agreement.map(agreement));
    show();
  } catch (error) {
    $("served").textContent = "not connected";
    refused(error);
  }
}

function show() {
  const [item] = items;
  $("item").hidden = item === undefined;
  $("empty").hidden = item !== undefined;
  if (!item) return;
  $("conversation").replaceChildren(...turns(item.conversation));
  $("text").textContent = item.answer === null ? "(no text is kept: CANDOR_KEEP_TEXTS)" : item.answer || "(an empty answer)";
  const thumb = item.thumb === null ? "" : `; whoever asked called it ${item.thumb ? "right" : "wrong"}`;
  $("about").textContent = `${item.id}, ${new Date(1000 * item.time).toLocaleString()}${item.reviewers ? "; labelled by another reviewer" : ""}${thumb}`;
  $("instead").value = "";
}

function turns(conversation) {
  if (conversation === null) return [element("p", { class: "hint" }, "(no text is kept: CANDOR_KEEP_TEXTS)")];
  if (typeof conversation === "string") return [element("p", { class: "text" }, conversation)];
  if (!Array.isArray(conversation)) return [element("p", { class: "text" }, JSON.stringify(conversation, null, 1))];
  return conversation.flatMap((turn) => [element("p", { class: "hint" }, turn.role ?? ""),
    element("p", { class: "text" }, typeof turn.content === "string" ? turn.content : JSON.stringify(turn, null, 1))]);
}

async function label(correct) {
  const [item] = items;
  if (!item || busy) return;
  busy = true;
  try {
    await sendLabel({ id: item.id, index: item.index, correct, answer: $("instead").value.trim() || null });
    $("said").textContent = `Noted: ${WORDS.get(correct)}.`;
    items.shift();
    if (items.length) show();
    else await load();
    $("item").focus({ preventScroll: true });
  } catch (error) {
    refused(error);
  } finally {
    busy = false;
  }
}

function putOff() {
  if (!items.length) return;
  later.add(name(items.shift()));
  $("said").textContent = "Later.";
  show();
}

function agreement({ reviewers, answers, share, kappa }) {
  const cell = (text) => element("td", { class: "number" }, text);
  return element("tr", {}, element("th", { scope: "row" }, reviewers.join(" and ")), cell(String(answers)),
    cell(share === null ? "–" : percent(share)), cell(kappa === null ? "–" : kappa.toFixed(2)));
}

document.addEventListener("keydown", (event) => {
  const typing = event.target instanceof HTMLTextAreaElement || event.target instanceof HTMLInputElement && event.target.type !== "radio";
  if (typing || event.ctrlKey || event.metaKey || event.altKey || $("key-dialog").open) return;
  const pressed = event.key.toLowerCase();
  if (pressed in KEYS) label(KEYS[pressed]);
  else if (pressed === "s") putOff();
});
for (const [id, correct] of [["right", true], ["wrong", false], ["unclear", null]]) {
  $(id).addEventListener("click", () => label(correct));
}
$("later").addEventListener("click", putOff);
document.querySelectorAll("input[name=kind]").forEach((one) => one.addEventListener("change", load));
keyDialog(load);
load();
