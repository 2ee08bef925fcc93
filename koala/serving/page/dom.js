// DOM helpers.

/** The element with an id; it always exists. */
export const $ = (id) => document.getElementById(id);

/**
 * A new element. Properties use DOM names; names with a dash are attributes. Children are elements
 * and text, so no string of a server or file is ever parsed as HTML.
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

let clearing = 0;

/** Shows a note for a few seconds, in the header or the open dialog; it covers nothing. */
export function notify(text) {
  const place = document.querySelector("dialog[open] [data-notes]") ?? $("notes");
  place.textContent = text;
  clearTimeout(clearing);
  clearing = setTimeout(() => {
    for (const other of document.querySelectorAll("#notes, [data-notes]")) other.textContent = "";
  }, 5000 + 60 * text.length);
}

/** Shows a note in the form until it is closed; "" closes it. */
export function tell(text) {
  $("told").firstElementChild.textContent = text;
  $("told").hidden = !text;
}

/** Announces text to screen readers only. */
export function announce(text) {
  $("spoken").textContent = text;
}

/** The state of a toggle button. */
export const pressed = (button) => button.getAttribute("aria-pressed") === "true";

export function press(button, on) {
  button.setAttribute("aria-pressed", String(on));
}

/** Closes a dialog by its [data-close] buttons and by a click outside. */
export function closable(dialog) {
  for (const button of dialog.querySelectorAll("[data-close]")) {
    button.addEventListener("click", () => dialog.close());
  }
  dialog.addEventListener("pointerdown", (event) => {
    if (event.target === dialog) dialog.close();
  });
}

/** JSON values in localStorage; silently empty where the browser forbids it. */
export const storage = {
  read(name) {
    try {
      return JSON.parse(localStorage.getItem(`koala.${name}`));
    } catch {
      return null;
    }
  },
  write(name, value) {
    try {
      localStorage.setItem(`koala.${name}`, JSON.stringify(value));
    } catch {
      // full or forbidden
    }
  },
};
