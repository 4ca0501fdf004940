"""What a merge becomes elsewhere, a whole model or another tool's file, and the way back."""

from icm_ray.exporting.adapter_formats import ADAPTER_FORMATS, export_adapter
from icm_ray.exporting.difference import extract_adapter
from icm_ray.exporting.full_model import export_model
from icm_ray.exporting.hub import has_token, plan_upload, push, upload_lines
from icm_ray.exporting.serving import serving_lines

__all__ = [
    "ADAPTER_FORMATS",
    "export_adapter",
    "export_model",
    "extract_adapter",
    "has_token",
    "plan_upload",
    "push",
    "serving_lines",
    "upload_lines",
]
