#!/bin/sh
# Runs in the guest (as /etc/run). The host times each piece by the "@" lines that it reads from the serial port.
piece() {
    name=$1
    shift
    echo "@start $name"
    "$@" >/dev/null 2>&1
    echo "@end $name"
}
make_data() { dd if=/bin/busybox of=/tmp/data bs=4k count=450; }
shell_loop() {
    i=0
    while [ $i -lt 60000 ]; do i=$((i + 1)); done
}
fork_exec() {
    i=0
    while [ $i -lt 300 ]; do /bin/busybox true; i=$((i + 1)); done
}
small_io() { dd if=/dev/zero of=/dev/null bs=1 count=100000; }
numbers() { seq 1 20000 | sort -r | awk '{s += $1 * 3 % 7} END {print s}'; }
echo "@end boot"
make_data >/dev/null 2>&1
piece gzip gzip -9 -c /tmp/data
piece bzip2 bzip2 -c /tmp/data
piece md5sum md5sum /tmp/data /tmp/data /tmp/data
piece sha256sum sha256sum /tmp/data
piece grep grep -c 'qu[a-z]*k' /tmp/data
piece sort+awk numbers
piece shell-loop shell_loop
piece fork+exec fork_exec
piece 1-byte-io small_io
echo "@done"
