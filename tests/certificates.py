"""Certificates for tests of TLS, in the current directory: files NAME.pem and NAME.key."""
import os
import subprocess


def openssl(*arguments):
    subprocess.run(["openssl", *arguments], check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]


def self_signed(name):
    openssl("req", "-x509", *KEY, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}", "-days", "2")


def signed(name):
    """The options by which one shows a certificate of the authority's and wants the other's to be one; made when they are not there."""
    if not os.path.exists("authority.pem"):
        self_signed("authority")
    if not os.path.exists(f"{name}.pem"):
        openssl("req", *KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "authority.pem", "-CAkey", "authority.key", "-CAcreateserial", "-out", f"{name}.pem", "-days", "2")
    return ["--cert", f"{name}.pem", "--cert-key", f"{name}.key", "--ca", "authority.pem"]
