"""A student as a product: its weights or ONNX model in a folder with a card and all its numbers."""

from __future__ import annotations

from logitcache.product.export import Exported as Exported
from logitcache.product.export import export_run as export_run
from logitcache.product.load import LoadedStudent as LoadedStudent
from logitcache.product.load import load_student as load_student
