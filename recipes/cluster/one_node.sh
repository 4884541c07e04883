#!/usr/bin/env bash
# One node of 8 GPUs: the teacher on 0 and 1, the server that samples on 2 and 3, the trainer on 4 to 7.
#   recipes/cluster/one_node.sh [--setting value ...]      settings of the run; docs/cluster/cluster.md
set -eu
STUDENT=${STUDENT:-runs/deepmath/8b} TEACHER=${TEACHER:-Qwen/Qwen3-32B} LOGS=${LOGS:-runs/deepmath/logs}
CONTEXT=${CONTEXT:-17664} PROCESSES=${PROCESSES:-4} TEACHER_PORT=${TEACHER_PORT:-8000} SAMPLING_PORT=${SAMPLING_PORT:-8001}
mkdir -p "$LOGS"
trap 'kill $(jobs -p) 2> /dev/null' EXIT

CUDA_VISIBLE_DEVICES=0,1 vllm serve "$TEACHER" --served-model-name teacher --port "$TEACHER_PORT" \
  --tensor-parallel-size 2 --max-model-len "$CONTEXT" --max-num-batched-tokens 2048 > "$LOGS/teacher.log" 2>&1 &
teacher=$!
CUDA_VISIBLE_DEVICES=2,3 VLLM_SERVER_DEV_MODE=1 vllm serve "$STUDENT" --served-model-name student --port "$SAMPLING_PORT" \
  --tensor-parallel-size 2 --max-model-len "$CONTEXT" --max-num-seqs 512 \
  --generation-config vllm --logprobs-mode processed_logprobs > "$LOGS/sampling.log" 2>&1 &
sampling=$!

ready() { # NAME PID PORT: waits until the server answers, or has ended
  until curl -sf "http://127.0.0.1:$3/health" > /dev/null; do
    kill -0 "$2" 2> /dev/null || { echo "the $1 server has ended:"; tail -n 5 "$LOGS/$1.log"; exit 1; }
    sleep 2
  done
  echo "the $1 server is ready"
}
ready teacher "$teacher" "$TEACHER_PORT"
ready sampling "$sampling" "$SAMPLING_PORT"

CUDA_VISIBLE_DEVICES=4,5,6,7 accelerate launch --config_file recipes/accelerate/one_node.yaml \
  --num_processes "$PROCESSES" -m fastkl.cli distill recipes/reasoning/gpu/qwen3-8b-full.yaml \
  --teacher.server.url "http://127.0.0.1:$TEACHER_PORT/v1" --sampling.server.url "http://127.0.0.1:$SAMPLING_PORT/v1" \
  --sampling.server.weights "${WEIGHTS:-/dev/shm/fastkl}" "$@"
