#!/usr/bin/env bash
# Prepares what a machine with a GPU, but without a network, needs for gpu_suite.py:
#
#   tests/benchmarks/gpu_bundle.sh DIR [ARCH...]        architectures: 90 80 by default
#
# DIR gets the kernel's library for those GPUs, the same kernel for the CPU (whose bits it is held to), the programs of
# test cases, and wheels for Python 3.12 on Linux x86-64 of what such a machine with PyTorch, ONNX, ONNX Runtime,
# scikit-learn, pytest and the like may lack. Take DIR along in a checkout; the commands to use it there are printed.
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,8p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
architectures=("${@:-90}")
[ $# -ge 1 ] || architectures=(90 80)
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# ---- libraries and programs. C++'s runtime goes into them: the other machine's may be older.
list=$(printf '%s-real;' "${architectures[@]}")
static="-static-libstdc++ -static-libgcc"
targets=(evit_token_reorg evit_token_reorg_host token_reorg_cases token_reorg_cases_gpu)
cmake -S "$root/plugins" -B "$scratch/build" -DCMAKE_BUILD_TYPE=Release -DEVIT_TENSORRT=OFF \
  "-DCMAKE_CUDA_ARCHITECTURES=${list%;}" "-DCMAKE_SHARED_LINKER_FLAGS=$static" "-DCMAKE_EXE_LINKER_FLAGS=$static" \
  > "$scratch/cmake.log" || { cat "$scratch/cmake.log" >&2; exit 1; }
cmake --build "$scratch/build" --parallel "$(nproc)" --target "${targets[@]}" > "$scratch/build.log" ||
  { tail -40 "$scratch/build.log" >&2; exit 1; }
rm -f "$out"/*.whl
for name in libevit_token_reorg.so libevit_token_reorg_host.so token_reorg_cases token_reorg_cases_gpu; do
  install -m 755 -s "$scratch/build/token_reorg/$name" "$out/$name"
done

# ---- wheels
pip=("$python" -m pip --quiet --disable-pip-version-check)
version_of() { "$python" -c "import importlib.metadata as m; print(m.version('$1'))"; }
"${pip[@]}" download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  --dest "$out" "msgspec==$(version_of msgspec)" "timm==$(version_of timm)" 2>&1 | grep -v '^WARNING: Location' || true
# Of evit-deploy only what pip writes down about it (versions, requirements): its code is the checkout's.
"${pip[@]}" wheel --no-deps --wheel-dir "$scratch" "$root" 2>&1 | grep -v '^WARNING: Location' || true
"$python" - "$scratch"/evit_deploy-*.whl "$out" <<'PYTHON'
import pathlib, sys, zipfile
source = pathlib.Path(sys.argv[1])
with zipfile.ZipFile(source) as whole, zipfile.ZipFile(pathlib.Path(sys.argv[2]) / source.name, "w") as part:
    names = [name for name in whole.namelist() if ".dist-info/" in name]
    for name in names:
        text = whole.read(name)
        if name.endswith("/RECORD"):
            text = b"".join(line for line in text.splitlines(True) if b".dist-info/" in line.split(b",")[0])
        part.writestr(name, text)
PYTHON
ls "$out"/msgspec-*.whl "$out"/timm-*.whl "$out"/evit_deploy-*.whl > /dev/null

relative=$(realpath --relative-to="$root" "$out")
du -sh "$out" | cut -f1 | sed "s|^|$relative: |"
cat <<TEXT
There, in the root of the checkout:

python3 -m pip install -q --no-index --no-deps --upgrade --target /tmp/site $relative/*.whl
export PYTHONPATH=\$PWD:/tmp/site EVIT_DEPLOY_KERNEL=\$PWD/$relative/libevit_token_reorg.so
python3 tests/benchmarks/gpu_suite.py --budget 520 --out DIR
TEXT
