"""A vision-language model on this machine as a backend: any that transformers knows as image-text-to-text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from threading import Lock
from typing import Any, final

import torch
from PIL import Image

from difflex.errors import BadInput
from difflex.explanation.asked import ImageView, Instruction, TokenUsage, VLMAnswer
from difflex.explanation.backend import BackendReply, VLMBackend

__all__ = ["LocalBackend"]


@final
class LocalBackend(VLMBackend):
    """A model in memory; it answers one question after another."""

    def __init__(self, model: str, *, device: str | None = None, offline: bool = False, longest: int = 512) -> None:
        """`model`: a folder or a hub name; `longest`: tokens that an answer may have."""
        import transformers

        self._name, self._longest, self._lock = model, longest, Lock()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            # The annotations of transformers name its bare classes, not what these make of a folder.
            self._processor: Any = transformers.AutoProcessor.from_pretrained(model, local_files_only=offline)
            loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(model, dtype="auto", local_files_only=offline)
        except (OSError, ValueError) as error:
            raise BadInput(
                f"'{model}' cannot be opened as a model that sees and speaks: {error}. Name a folder or hub name of an "
                "image-text-to-text model of transformers."
            ) from error
        if not getattr(self._processor, "chat_template", None):
            raise BadInput(f"'{model}' has no chat template: it was not made to be told what to do. Name one that was.")
        self._model = loaded.to(device).eval()

    @property
    def name(self) -> str:
        """Its folder or hub name."""
        return self._name

    def see(
        self, views: Sequence[ImageView], instruction: Instruction, schema: type[VLMAnswer], objection: str = ""
    ) -> BackendReply:
        """What the model answers, the likeliest word each time."""
        images = [{"type": "image", "image": Image.open(io.BytesIO(view.png)).convert("RGB")} for view in views]
        told = f"{instruction.text}\n{objection}".rstrip()
        messages = [{"role": "user", "content": [*images, {"type": "text", "text": told}]}]
        with self._lock, torch.inference_mode():
            inputs = self._processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            ).to(self._model.device, dtype=self._model.dtype)
            words = self._model.generate(**inputs, max_new_tokens=self._longest, do_sample=False)
        asked = inputs["input_ids"].shape[1]
        text = self._processor.decode(words[0, asked:], skip_special_tokens=True)
        return BackendReply(text, TokenUsage(asked, words.shape[1] - asked, 0.0))
