// What both pages do where the server refuses: say why, and ask for a key where one is missing.

import { ApiError, key } from "./api.js";
import { $ } from "./dom.js";

export function trouble(message) {
  $("trouble").hidden = message === null;
  $("trouble").textContent = message ?? "";
}

// Shows an ApiError; anything else is a fault of the page and is thrown on.
export function refused(error) {
  if (!(error instanceof ApiError)) throw error;
  if (error.status === 401 || error.status === 403) askForKey();
  trouble(error.message);
}

function askForKey() {
  $("key").value = key.get();
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

// reload: called when another key was given.
export function keyDialog(reload) {
  $("key-open").addEventListener("click", askForKey);
  $("key-cancel").addEventListener("click", () => $("key-dialog").close());
  $("key-form").addEventListener("submit", () => {
    key.set($("key").value.trim());
    reload();
  });
}
