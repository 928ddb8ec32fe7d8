#!/usr/bin/env python3
"""Debian's kernel and a shell's work under both engines in lockstep, undisturbed or with the translator disturbed: lockstep.py CONFORM_LOCKSTEP SEED."""
import os
import subprocess
import sys

import guest

WORK = [
    'uname -a; ls -laR /etc | md5sum; dmesg | wc -l',
    'for n in 1 2 3; do dd if=/dev/zero bs=1k count=64 2>/dev/null | sha1sum; done',
    'i=0; while [ $i -lt 200 ]; do i=$((i+1)); echo $((i*i%97)); done | sort -n | uniq -c | awk \'{s+=$1*$2} END {print s/7}\'',
    'dmesg >/tmp/a; gzip -c /tmp/a | gunzip | cmp - /tmp/a && bzip2 -c /tmp/a | bunzip2 | cmp - /tmp/a && echo same',
    'sleep 1 & sleep 0.1; kill $!; (sleep 0.2; echo later) & wait; cat /proc/interrupts | head -3',
    'poweroff',
]


def main():
    lockstep, seed = sys.argv[1:]
    initrd = guest.cached('demo-initrd.gz')
    guest.need(guest.kernel)
    command = [lockstep, '--kernel', guest.kernel, '--initrd', initrd, '--append', 'console=ttyS0 panic=-1', '--seed', seed, '--verbose', '--type', '\n'.join(WORK) + '\n']
    if seed != '0':
        command.append('--disturb')
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors='replace')
    output = done.stdout.replace('\r', '')
    if done.returncode == guest.SKIP:
        print(output)
        return guest.SKIP
    missing = [text for text in ('\nsame\n', '\nlater\n', 'the guest powered off') if text not in output]
    if done.returncode or missing:
        print(f'exit status {done.returncode}, missing: {missing}\n{output[-6000:]}{done.stderr[-3000:]}')
        return 1
    print(output[output.rindex('\n', 0, -1):].strip())
    return 0


if __name__ == '__main__':
    sys.exit(main())
