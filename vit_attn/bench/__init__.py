"""Benchmarks: ``python -m vit_attn.bench {attention,model,data,step}``."""

import os

# Kineto, the profiler's engine, reports to stderr that a machine has no GPU; it reads this when torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
