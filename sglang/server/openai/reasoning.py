"""Reasoning apart from the answer, in a model's text as it streams."""

from __future__ import annotations

from sglang.server.detokenizer import StopFinder


class ReasoningSplitter:
    """<think>...</think> and then the answer, told apart as they stream."""

    def __init__(self, begun: bool) -> None:
        """begun: the prompt ends within the reasoning."""
        self._state = "thinking" if begun else "start"
        self._text = ""

    def push(self, piece: str) -> tuple[str, str]:
        """(reasoning, answer)."""
        self._text += piece
        if self._state == "start":
            text = self._text.lstrip()
            if text.startswith("<think>"):
                self._state, self._text = "thinking", text[len("<think>") :]
            elif "<think>".startswith(text):
                return "", ""
            else:
                self._state = "answer"
        reasoning = ""
        if self._state == "thinking":
            if self._text.startswith("<think>"):
                self._text = self._text[len("<think>") :]
            at = self._text.find("</think>")
            if at < 0:
                at = StopFinder.first_prefix(self._text, "</think>")
                reasoning, self._text = self._text[:at], self._text[at:]
                return reasoning, ""
            reasoning, self._text = self._text[:at], self._text[at + len("</think>") :].lstrip("\n")
            self._state = "answer"
        answer, self._text = self._text, ""
        return reasoning, answer

    def finish(self) -> tuple[str, str]:
        text, self._text = self._text, ""
        return (text, "") if self._state == "thinking" else ("", text)
