// The page's words in the browser's language: en.json and its siblings, one key a text.

import { call } from "./server.js";

const LANGUAGES = ["en", "de", "fr", "ko"];
let words = {};

/** Loads the words and fills the page's texts: data-t, and data-t-label, -title, -placeholder. */
export async function startWords() {
  const wanted = navigator.languages.map((tag) => tag.slice(0, 2).toLowerCase());
  const language = wanted.find((tag) => LANGUAGES.includes(tag)) ?? "en";
  words = await call(`page/${language}.json`);
  document.documentElement.lang = language;
  const places = {
    t: (element, text) => (element.textContent = text),
    tLabel: (element, text) => element.setAttribute("aria-label", text),
    tTitle: (element, text) => (element.title = text),
    tPlaceholder: (element, text) => (element.placeholder = text),
  };
  for (const [name, put] of Object.entries(places)) {
    const attribute = name.replace(/[A-Z]/, (letter) => `-${letter.toLowerCase()}`);
    for (const element of document.querySelectorAll(`[data-${attribute}]`)) {
      put(element, t(element.dataset[name]));
    }
  }
}

/** The text of a key, with the values in place of {name}; the key itself until texts are there. */
export function t(key, values = {}) {
  return (words[key] ?? key).replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** The text of `key` for a number n: `key-one` for 1, else `key`. */
export const many = (key, n, values = {}) => t(n === 1 ? `${key}-one` : key, { n, ...values });
