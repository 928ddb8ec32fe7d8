"""The host's end of the transfers (jobs/net.py), on the loopback address. One line asks: "get SEED SIZE", "put SIZE" or "echo"."""
import hashlib
import random
import socketserver
import threading


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        try:
            words = self.rfile.readline(100).decode().split()
            if words[0] == "get":
                self.wfile.write(random.Random(int(words[1])).randbytes(int(words[2])))
            elif words[0] == "put":
                self.wfile.write(hashlib.sha256(self.rfile.read(int(words[1]))).hexdigest().encode())
            else:
                while data := self.rfile.read1(65536):
                    self.wfile.write(data)
        except OSError:
            pass    # the client notices


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.port = self.server_address[1]
        threading.Thread(target=self.serve_forever, daemon=True).start()
