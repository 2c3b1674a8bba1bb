"""What `scripts.bench` measures: contenders, rivals, floors, timing, counting, tables."""
