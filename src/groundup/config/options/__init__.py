"""
Every option of groundup, declared once.

Each group is a frozen dataclass; the field's name is the flag's name, the key in a config file and the argument in
Python. Names and defaults are those of Hugging Face's ``TrainingArguments``, ``GPT2Config`` and ``GenerationConfig``
where they have one; where a name is ours or a default differs, ``why`` says so.
"""

from groundup.config.options.commands import (
    DoctorOptions,
    DrawingOptions,
    EvaluationOptions,
    ExportOptions,
    GenerationOptions,
    ImportOptions,
    LabOptions,
    ReportOptions,
    ScoreOptions,
    WatchOptions,
    WeightsOptions,
)
from groundup.config.options.data import CodeOptions, DataOptions, TokenizerOptions
from groundup.config.options.machine import MachineOptions, SpeedOptions
from groundup.config.options.model import InitialWeightsOptions, ModelOptions
from groundup.config.options.optimization import BatchOptions, OptimizerOptions, ScheduleOptions, TargetOptions
from groundup.config.options.run import RunOptions, SelectionOptions, SpikeOptions, TrackingOptions

PREPARE_GROUPS = (DataOptions, TokenizerOptions)
TRAIN_GROUPS = (
    DataOptions,
    TokenizerOptions,
    CodeOptions,
    ModelOptions,
    InitialWeightsOptions,
    BatchOptions,
    ScheduleOptions,
    OptimizerOptions,
    TargetOptions,
    RunOptions,
    SelectionOptions,
    SpikeOptions,
    TrackingOptions,
    MachineOptions,
    SpeedOptions,
)
DOCTOR_GROUPS = (DoctorOptions, *TRAIN_GROUPS)
EVALUATE_GROUPS = (EvaluationOptions, WeightsOptions, MachineOptions)
GENERATE_GROUPS = (GenerationOptions, WeightsOptions, MachineOptions)
SCORE_GROUPS = (ScoreOptions, WeightsOptions, MachineOptions)
IMPORT_GROUPS = (ImportOptions,)
EXPORT_GROUPS = (ExportOptions, WeightsOptions)
LAB_GROUPS = (LabOptions,)
REPORT_GROUPS = (ReportOptions,)
SCHEDULE_GROUPS = (ScheduleOptions, DrawingOptions)
WATCH_GROUPS = (WatchOptions, WeightsOptions)

COMMANDS = {
    "prepare": PREPARE_GROUPS,
    "train": TRAIN_GROUPS,
    "evaluate": EVALUATE_GROUPS,
    "generate": GENERATE_GROUPS,
    "score": SCORE_GROUPS,
    "import": IMPORT_GROUPS,
    "export": EXPORT_GROUPS,
    "schedule": SCHEDULE_GROUPS,
    "doctor": DOCTOR_GROUPS,
    "report": REPORT_GROUPS,
    "watch": WATCH_GROUPS,
    "lab": LAB_GROUPS,
}

__all__ = [
    "COMMANDS",
    "DOCTOR_GROUPS",
    "EVALUATE_GROUPS",
    "EXPORT_GROUPS",
    "GENERATE_GROUPS",
    "IMPORT_GROUPS",
    "LAB_GROUPS",
    "PREPARE_GROUPS",
    "REPORT_GROUPS",
    "SCHEDULE_GROUPS",
    "SCORE_GROUPS",
    "TRAIN_GROUPS",
    "WATCH_GROUPS",
    "BatchOptions",
    "CodeOptions",
    "DataOptions",
    "DoctorOptions",
    "DrawingOptions",
    "EvaluationOptions",
    "ExportOptions",
    "GenerationOptions",
    "ImportOptions",
    "InitialWeightsOptions",
    "LabOptions",
    "MachineOptions",
    "ModelOptions",
    "OptimizerOptions",
    "ReportOptions",
    "RunOptions",
    "ScheduleOptions",
    "ScoreOptions",
    "SelectionOptions",
    "SpeedOptions",
    "SpikeOptions",
    "TargetOptions",
    "TokenizerOptions",
    "TrackingOptions",
    "WatchOptions",
    "WeightsOptions",
]
