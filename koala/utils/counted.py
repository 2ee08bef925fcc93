"""Numbers of things in words."""


def counted(number: int, noun: str) -> str:
    """1, "prompt" -> "1 prompt"; 1024, "prompt" -> "1,024 prompts"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
