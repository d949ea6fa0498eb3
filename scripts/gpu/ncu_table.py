"""A short table of what Nsight Compute read: `python scripts/gpu/ncu_table.py RAW.csv` prints a line a metric, a column a launch."""

import csv
import re
import sys
from pathlib import Path

WANTED = re.compile(
    "|".join(
        [
            r"gpu__time_duration\.sum",
            r"gpc__cycles_elapsed\.avg\.per_second",
            r"sm__throughput\.avg\.pct.*",
            r"gpu__compute_memory_throughput\.avg\.pct.*",
            r"sm__(inst_executed_)?pipe_tensor.*pct_of_peak_sustained_(active|elapsed)",
            r"l1tex__data_pipe_lsu_wavefronts_mem_shared\.(sum|avg\.pct.*)",
            r"l1tex__data_bank.*conflict.*\.sum",
            r"smsp__inst_executed_op_shared.*\.sum",
            r"sm__(mem|memory)_throughput.*pct.*",
            r"l1tex__throughput.*pct.*",
            r"lts__t_sector_hit_rate\.pct",
            r"lts__t_bytes\.sum",
            r"lts__t_sectors_op_(read|write)\.sum",
            r"lts__throughput\.avg\.pct.*",
            r"dram__bytes_(read|write)\.sum",
            r"dram__throughput\.avg\.pct.*elapsed",
            r"smsp__average_warps?_issue_stalled_.*_per_issue_active\.ratio",
            r"smsp__average_warp_latency_issue_stalled_.*",
            r"smsp__issue_active\.avg\.pct.*",
            r"launch__(registers_per_thread|shared_mem_per_block_dynamic|grid_size|waves_per_multiprocessor)",
            r"sm__warps_active\.avg\.pct.*",
        ]
    )
)


def table(text: str) -> list[str]:
    """Return the lines; `text`: the raw page as CSV, between lines of the program's own."""
    units, *launches = csv.DictReader(line for line in text.splitlines() if line.startswith('"'))
    lines = [f"[{i}] {one['Kernel Name'][:100]} grid {one['Grid Size']} block {one['Block Size']}" for i, one in enumerate(launches)]
    return lines + [f"{name} [{units[name]}]: {' | '.join(one[name] for one in launches)}" for name in units if WANTED.fullmatch(name)]


def main() -> None:
    sys.stdout.write("\n".join(table(Path(sys.argv[1]).read_text(encoding="utf-8"))) + "\n")


if __name__ == "__main__":
    main()
