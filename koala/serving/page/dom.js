// Small tools for elements: find, make, tell.

/** The element of an id; the page is written so that it is there. */
export const $ = (id) => document.getElementById(id);

/**
 * A new element. Properties go by the DOM's names, those with a dash are attributes; children
 * are elements and texts, so nothing that a server or a file says is ever read as HTML.
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

/** Shows a note for some seconds, over any dialog; screen readers say it. */
export function tell(text) {
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

/** Tells screen readers what can be seen already. */
export function say(text) {
  $("spoken").textContent = text;
}

/** Whether a button that can be pressed in is. */
export const pressed = (button) => button.getAttribute("aria-pressed") === "true";

export function press(button, on) {
  button.setAttribute("aria-pressed", String(on));
}

/** Buttons marked so, and a click beside it, close their dialog. */
export function closable(dialog) {
  for (const button of dialog.querySelectorAll("[data-close]")) {
    button.addEventListener("click", () => dialog.close());
  }
  dialog.addEventListener("pointerdown", (event) => {
    if (event.target === dialog) dialog.close();
  });
}

/** Something kept over reloads, as JSON under one name; nothing where the browser keeps nothing. */
export const kept = {
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
      // full, or forbidden: then it is not kept
    }
  },
};
