"""What other programs read in a prompt and this one does not: refused, or said to be words.

What certainly means something else is refused. What may as well be words gets a note. Importing
this loads no torch.
"""

import re

from koala.errors import UserError

_ROUND = r"(?<!\\)\([^()]*(?<!\\)\)"  # brackets that are not escaped
_WEIGHT = "a weight is written (cat:1.3)"
_OPTIONS = (  # of Midjourney and of chat bots
    "ar|aspect|no|v|version|s|stylize|q|quality|seed|chaos|iw|niji|style|tile|stop|weird|sref|cref"
    "|cw|sw|repeat|raw|fast|turbo|relax|draft|hd|steps|cfg|neg|negative"
)
_REFUSED = {
    r"\bAND(_PERP|_SALT|_TOPK)?\b": "joins several prompts in AUTOMATIC1111's and cannot be used "
    "here: separate them by commas, or write 'and'",
    r"\b(ADDCOL|ADDROW|ADDCOMM|ADDBASE)\b": "splits the image into regions in an extension of "
    "AUTOMATIC1111's and cannot be used here: leave it out",
    r"\b(COUPLE|MASK|IMASK|AREA|FEATHER)\([^()]*\)": "splits the image into regions in an "
    "extension of ComfyUI's and cannot be used here: leave it out",
    r"\$\{[^{}]*\}": "is a variable of dynamic prompts and is not read here: write the words "
    "themselves",
    r"(?<!\\)\{[^{}|]*\|[^{}]*\}": "chooses between words in dynamic prompts and is not done here: "
    "give a prompt for each, or take turns by [a|b]",
    r"\b__[\w/*-]+?__\b": "stands for a list of words in dynamic prompts and is not read here: "
    "write the word itself",
    r"\bembedding:[\w.-]+": "is ComfyUI's for a textual inversion: write its name alone, and give "
    "the file by --embedding",
    r"[\w)\"']\.(and|blend|swap)\([^()]*\)": "joins prompts in InvokeAI and compel and cannot be "
    "used here: [cat|dog] takes turns",
    _ROUND + r"(\d+\.?\d*|\.\d+)(?=[\s,.)]|$)": "is a weight in InvokeAI and compel: write it "
    "(cat:1.3)",
    _ROUND + r"(\+{1,9}|-{1,9})(?=[\s,.)]|$)": f"is a weight in InvokeAI and compel: {_WEIGHT}",
    r"(?<!\\)\([^()]*:\s*([-+]?\d+,\d+|\d+(\.\d+)?\s*%|[\u2212\u2013]\s*[\d.]+"
    r"|\d+\.\d+\.[\d.]*)\s*\)": f"has no weight that can be read: {_WEIGHT}",
    r"(?<![\w.])-?(\d+\.?\d*|\.\d+)::": f"is a weight in NovelAI: {_WEIGHT}",
    r"\w::\s?-?[\d.]+": f"is a weight in Midjourney: {_WEIGHT}",
    rf"(?<!\S)(--|\u2014|\u2013)({_OPTIONS})\b": "is an option of Midjourney's: options of koala's "
    "stand outside of the prompt, as --size and --negative-prompt do",
    r"^\s*/imagine\b": "is a command to Midjourney's bot: leave it out",
    r"<\|(start|end)oftext\|>": "is a token that stands around every prompt: leave it out",
}  # fmt: skip
_NOTED = {
    r"\{[^{}]*\}": f"is words here, brackets too; {_WEIGHT}",
    r"\w{1,30}(\+\+|--)+(?=[\s,.)]|$)": f"is words here; {_WEIGHT}",
    r"(?i)<\s*lora\s*:[^<>:]*$": "is words here; a LoRA is written <lora:NAME:0.8>",
    r"<[\w-]+>": "is words here; a textual inversion is given by --embedding and written as its "
    "file's name",
    r"\uff08[^\uff08\uff09]*[:\uff1a][\d.\s]+\uff09": f"is words here, brackets too; {_WEIGHT}",
    r"\([^()]*:\s*[\d.]+\s*$": "is not closed, so its number is words",
    r"(?i)\bnegative prompt\s*:": "is words here; a negative prompt is given by itself",
    r"\bSteps: \d+, Sampler:": "is words here; settings are given by themselves",
    r"(?m)^[ \t]*#[ \t].*$": "is words here; comments are not left out",
    r"\((?!\d)[^()\[\]:]+:[^()\[\]:]+:0?\.\d+\)": "is a weight here; a change is written "
    "[cat:dog:0.5]",
}
_SHOWN = 60  # characters


def refuse(prompt: str) -> None:
    """UserError for what has another meaning in other programs and none here."""
    plain = _without_changes(prompt)
    for pattern, meaning in _REFUSED.items():
        if found := re.search(pattern, plain if "::" in pattern else prompt):
            raise UserError(f"the prompt has {_shown(found[0])}, which {meaning}")


def notes(prompt: str) -> list[str]:
    """A line for each thing that other programs would not read as words."""
    found = ((re.search(pattern, prompt), meaning) for pattern, meaning in _NOTED.items())
    return [f"the prompt has {_shown(m[0])!r}, which {meaning}" for m, meaning in found if m]


def _without_changes(prompt: str) -> str:
    """The prompt without its [...], where two colons are an empty text."""
    while (shorter := re.sub(r"\[[^\[\]]*\]", "", prompt)) != prompt:
        prompt = shorter
    return prompt


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
