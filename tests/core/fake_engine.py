"""An engine process that is no engine: it speaks the frames and does what requests ask of it."""

# mypy: ignore-errors
# ruff: noqa: F403, F405

import os
import pathlib
import socket
import sys
import threading
import time
import zlib

import msgspec

from trunkline.core.engine.channel import read_frame
from trunkline.core.engine.messages import *
from trunkline.core.engine.pass_record import PassRecord
from trunkline.core.types import ModelInfo

sock = socket.socket(fileno=int(sys.argv[-1]))
lock = threading.Lock()
first = msgspec.msgpack.decode(read_frame(sock))
models = first["config"]["models"]
record = PassRecord(first["record"])
running = []
alone = []
beating = True
loads = [Load(models[0]["served_model_name"] or models[0]["model_path"], 1, 2, 0, 900, 1000)]
age = 0.0
work = ""
aborted = []
calls = []
held = None
former = []  # names
paused = first["paused"] or [False] * len(models)
contents = []  # the paths of sent files, and digests of what is in them
applied = []  # the numbers of weights
weights = {
    "update_number": first.get("update_numbers", [0])[0] if first.get("update_numbers") else 0,
    "label_number": 0,
    "weights_sent": False,
}


def send(*messages):
    with lock:
        sock.sendall(frame(list(messages)))


def beat():
    while beating:
        send(Heartbeat(age, loads, work))
        time.sleep(0.05)


def served(m):
    info = ModelInfo(
        path="/",
        architecture="FakeForCausalLM",
        model_type="fake",
        context_length=512,
        vocab_size=1000,
        hidden_size=8,
        causal=True,
    )
    return ServedModel(
        name=m["served_model_name"] or m["model_path"],
        aliases=tuple(former),
        model_path=m["model_path"],
        tokenizer_path=m["model_path"],
        info=info,
        tasks={"echo": True},
        refused={"sing": "It can not sing."},
        max_total_tokens=m["max_total_tokens"] or 1000,
        max_running_requests=4,
        dtype="float32",
        attention_backend="cpu",
        fused="",
        weight_version=m["weight_version"],
        **weights,
    )


def changed():
    return ModelsChanged([served(m) for m in models], models, paused)


def apply(arguments):
    """Serve other weights, unless they have a lower number; without a path, as if they were sent."""
    if arguments["update_number"] > weights["update_number"]:
        applied.append(arguments["update_number"])
        former.append(models[0]["served_model_name"] or models[0]["model_path"])
        weights["update_number"], weights["weights_sent"] = arguments["update_number"], "model_path" not in arguments
        models[0]["model_path"] = arguments.get("model_path", models[0]["model_path"])
        models[0]["weight_version"] = arguments["weight_version"]
        send(changed())
    return {"success": True, "message": "applied"}


def run(message):
    """Answer with ``n`` tokens, the prompt's ids repeated, ``delay`` seconds apart."""
    params = msgspec.msgpack.decode(message.params)
    prompt = memoryview(message.prompt).cast("i").tolist()
    time.sleep(params.get("queue", 0))
    if message.key in aborted:
        return
    send(Started(message.key, len(prompt) - 1))
    if params.get("refuse"):
        return send(Progress(message.key, [], error=(400, "refused", "text")))
    (alone if message.alone else running).append(message.key)
    record.note([message.key] if message.alone else running)
    if "fatal" in params:  # dies in a pass of its own, or in one with all that run beside it
        time.sleep(params["fatal"])
        record.note([message.key] if message.alone else running)
        os._exit(9)
    n = params.get("n", 3)
    for i in range(n):
        time.sleep(params.get("delay", 0))
        if message.key in aborted:
            send(Progress(message.key, [], finish={"type": "abort", "message": "Aborted"}))
            break
        finish = {"type": "length", "length": n} if i == n - 1 else None
        data = msgspec.msgpack.encode({"step": i})
        send(Progress(message.key, [prompt[i % len(prompt)]], data=data, finish=finish, cached=len(prompt) - 1))
    (alone if message.alone else running).remove(message.key)


def call(message):
    global beating, age, work, held, paused
    if message.control == "probe":
        send(Answer(message.key, {"type": "length"}))
    elif message.control == "flush_cache":
        send(Answer(message.key, not busy()))
    elif message.control in ("pause", "continue", "drain"):
        calls.append([message.control, message.model, message.arguments])
        if message.control != "drain":
            paused = [message.control == "pause"] * len(models)
        send(changed(), Answer(message.key))
    elif message.control == "calls":
        send(Answer(message.key, calls))
    elif message.control == "paused":
        send(Answer(message.key, first["paused"]))
    elif message.control == "change":
        send(ModelsChanged([served(m) for m in models], models, message.arguments["paused"]), Answer(message.key))
    elif message.control in ("update_weights", "update_weights_from_tensor"):
        calls.append([message.control, message.model, message.arguments])
        if os.path.exists(path := message.arguments.get("path", "")):
            contents.append([path, zlib.crc32(pathlib.Path(path).read_bytes())])
        if message.arguments.get("model_path", "") == models[0]["chat_template"]:  # the one that this engine refuses
            send(Answer(message.key, {"success": False, "message": "refused"}))
        elif message.arguments.get("hold"):
            held = message.arguments
            send(Answer(message.key, {"success": True, "message": "held"}))
        else:
            send(Answer(message.key, apply(message.arguments)))
    elif message.control == "update_weight_version":
        calls.append([message.control, message.model, message.arguments])
        weights["label_number"] = message.arguments.get("label_number") or weights["label_number"] + 1
        models[0]["weight_version"] = message.arguments["new_version"]
        send(changed(), Answer(message.key, {"success": True}))
    elif message.control == "never":
        pass
    elif message.control == "late":
        threading.Timer(message.arguments["seconds"], lambda: send(Answer(message.key, True))).start()
    elif message.control == "contents":
        send(Answer(message.key, contents))
    elif message.control == "applied":
        send(Answer(message.key, applied))
    elif message.control in ("commit_update", "cancel_update"):
        calls.append([message.control, message.model, message.arguments])
        if held is None or held["hold"] != message.arguments["hold"]:
            send(Answer(message.key, error=(409, "nothing is held", None)))
        else:
            update, held = held, None
            send(Answer(message.key, apply(update) if message.control == "commit_update" else True))
    elif message.control == "aborted":
        send(Answer(message.key, len(aborted)))
    elif message.control == "die":
        record.note([message.key])
        os._exit(7)
    elif message.control == "alone":
        send(Answer(message.key, alone))
    elif message.control == "silent":
        beating = False
    elif message.control == "hang":
        age = 1000.0
    elif message.control == "beat":
        age, work = message.arguments["age"], message.arguments.get("work", "")
        send(Heartbeat(age, loads, work), Answer(message.key, None))
    elif message.control == "nonsense":
        with lock:
            sock.sendall((5).to_bytes(4, "little") + b"abcde")
    else:
        send(Answer(message.key, error=(404, "no such control", None)))


def busy():
    return any(t.name == "work" and t.is_alive() for t in threading.enumerate())


mode = models[0]["revision"]
if mode == "fails":
    send(Failed("The model is made of cheese."))
    sys.exit(1)
if mode == "dies":
    os._exit(3)
if mode == "once":
    mark = models[0]["chat_template"] + ".mark"
    if os.path.exists(mark):
        os._exit(4)
    open(mark, "w").close()
send(Loading("warming up"))
if mode == "slow":
    time.sleep(600)
send(
    Ready(
        [served(m) for m in models],
        [{"model": served(m).name, "weight_bytes": 1, "kv_bytes": 2048, "tokens": 1000} for m in models],
        {"load": 0.1},
        paused,
    )
)
threading.Thread(target=beat, daemon=True).start()
while (body := read_frame(sock)) is not None:
    for message in front_decoder.decode(body):
        if isinstance(message, Submit):
            threading.Thread(target=run, args=(message,), daemon=True, name="work").start()
        elif isinstance(message, Abort):
            aborted.append(message.key)
            busy_with = record.keys()
            if message.key not in busy_with:
                send(Progress(message.key, [], finish={"type": "abort", "message": "Aborted"}))
        elif isinstance(message, Call):
            call(message)
        elif isinstance(message, Stop):
            os._exit(0)
