"""Run sparse models faster: sparse layers and the choice between them, benchmark, export, int8."""
