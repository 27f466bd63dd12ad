"""Tokens per second of a dense and a packed model behind two running servers, asked in turns by 1, 8 and 32 clients at once.

    vllm serve DENSE --port 8001 & vllm serve PACKED --port 8002 &
    python examples/bench_serving.py http://localhost:8001 http://localhost:8002

Any server of the /v1/completions interface will do. Both are up all the time, and one rests while the other is asked, so that
whatever else the machine does falls on both. What is printed is the median over the rounds, and the median of the ratios.
"""

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen

PROMPT = "The history of the city begins with the first settlers, who came over the mountains in search of water. In year {}, "


def post(url: str, body: dict) -> dict:
    """The JSON that a server answers a request with."""
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=3600) as response:
        return json.load(response)


def model_of(url: str) -> str:
    """The name of the first model that a server offers."""
    with urlopen(f"{url}/v1/models", timeout=60) as response:
        return json.load(response)["data"][0]["id"]


def tokens_per_second(url: str, model: str, clients: int, tokens: int) -> float:
    """Tokens that `clients` requests at once give, by the time until the last has its answer."""
    bodies = [
        {"model": model, "prompt": PROMPT.format(1000 + client), "max_tokens": tokens, "temperature": 0}
        for client in range(clients)
    ]
    with ThreadPoolExecutor(clients) as pool:
        start = time.perf_counter()
        answers = list(pool.map(lambda body: post(f"{url}/v1/completions", body), bodies))
        seconds = time.perf_counter() - start
    return sum(answer["usage"]["completion_tokens"] for answer in answers) / seconds


def main() -> None:
    """Print a row for each number of clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", help="address of the server with the dense model")
    parser.add_argument("packed", help="address of the server with the packed one")
    parser.add_argument("--model", nargs=2, help="what the servers call them; default: the first that each offers")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    urls = args.dense, args.packed
    servers = list(zip(urls, args.model or map(model_of, urls), strict=True))
    print("| clients | dense tokens/s | packed tokens/s | packed / dense |\n|---|---|---|---|")
    for clients in args.clients:
        for url, model in servers:
            tokens_per_second(url, model, clients, 4)  # the first batch of a size may compile or allocate
        rounds = [[tokens_per_second(*server, clients, args.tokens) for server in servers] for _ in range(args.rounds)]
        dense, packed = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(after / before for before, after in rounds)
        print(f"| {clients} | {dense:.1f} | {packed:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
