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

/** Shows a note for a few seconds, above any dialog; screen readers read it. */
export function notify(text) {
  const note = make("p", { className: "note" }, text);
  const notes = $("notes");
  if (notes.matches(":popover-open")) notes.hidePopover();
  notes.showPopover();
  notes.append(note);
  while (notes.childElementCount > 3) notes.firstElementChild.remove();
  setTimeout(() => {
    note.remove();
    if (notes.childElementCount === 0) notes.hidePopover();
  }, 4000 + 50 * text.length);
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
