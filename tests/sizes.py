"""The size of the top level against its budget:  make sizes

The method is to stay small enough to be read in one sitting. Exit status 1 if a budget is exceeded.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINES = {
    "slider.py": 260,
    "train_text.py": 180,
    "train_pairs.py": 140,
    "train_space.py": 330,
    "lora.py": 220,
    "sampler.py": 200,
    "student.py": 150,
    "invert.py": 130,
    "sdxl.py": 200,
    "sdxl_unet.py": 320,
    "sdxl_vae.py": 180,
}
TOTAL, COLUMNS, README = 2300, 100, 10_000


def main():
    count = lambda path: len(path.read_text().splitlines())
    rows = [(name, count(ROOT / name), most) for name, most in LINES.items()]
    rows.append(("together", sum(lines for _, lines, _ in rows), TOTAL))
    others = sorted(path.name for path in ROOT.glob("*.py") if path.name not in LINES)
    rows.append(("other modules at the top", len(others), 0))
    command = ["git", "ls-files", "*.py"]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    files = [ROOT / name for name in tracked.stdout.split() if (ROOT / name).exists()]
    wide = sum(len(line) > COLUMNS for file in files for line in file.read_text().splitlines())
    rows.append((f"lines over {COLUMNS} columns", wide, 0))
    rows.append(("README.md, characters", len((ROOT / "README.md").read_text()), README))
    for name, found, most in rows:
        print(f"{name:26}{found:8,} of {most:6,}{'' if found <= most else '   TOO MANY'}")
    for folder in ("support", "formats", "extras", "miniature", "experiments", "bench", "tests"):
        lines = sum(count(path) for path in (ROOT / folder).rglob("*.py"))
        print(f"{folder + '/':26}{lines:8,} lines")
    sys.exit(any(found > most for _, found, most in rows))


if __name__ == "__main__":
    main()
