"""A chat endpoint that really answers over HTTP, for tests of what talks to one."""

import contextlib
import http.server
import json
import threading


@contextlib.contextmanager
def serve(answer):
    """Serves `answer(messages) -> text, or an int status`; yields (url, list of request bodies)."""
    bodies = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            bodies.append({"path": self.path, "authorization": self.headers.get("authorization"), **body})
            text = answer(body["messages"])
            status = text if isinstance(text, int) else 200
            reply = {"error": {"message": "refused"}} if status != 200 else {
                "object": "chat.completion", "choices": [
                    {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", bodies
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
