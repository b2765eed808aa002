"""Export of a trained student: weights or an ONNX model in a folder with a model card and measured numbers."""

from __future__ import annotations

from logitcache.extras.student_export.export import Exported as Exported
from logitcache.extras.student_export.export import export_run as export_run
from logitcache.extras.student_export.load import LoadedStudent as LoadedStudent
from logitcache.extras.student_export.load import load_student as load_student
