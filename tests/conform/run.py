#!/usr/bin/env python3
"""Runs one conformance program: run.py PROGRAM [--doppel D] [--cpus N] [--engine E] [--irqchip WHERE] [--direct MODE] [--seconds S] [--append LINE] [--qemu].

Exit status 0 when the program reported at least one check, no failure, and DONE; 77 (skipped) when the host cannot run the engine. With --direct always, user code must have been
executed directly, too (doppel's statistics tell). --qemu runs it under QEMU's TCG instead, for cross-checking by hand.
"""
import argparse
import os
import re
import subprocess
import sys
import tempfile


def command(args, console):
    if args.qemu:
        return [args.qemu_program, '-accel', 'tcg', '-cpu', args.qemu_cpu, '-machine', 'q35', '-m', '256', '-smp', str(args.cpus), '-display', 'none',
                '-no-reboot', '-serial', 'file:' + console, '-monitor', 'none', '-kernel', args.program, '-append', args.append]
    line = [args.doppel, 'run', '--kernel', args.program, '--memory', '256M', '--cpus', str(args.cpus), '--console', 'file:' + console,
            '--on-reset', 'exit', '--append', args.append + (' direct' if args.direct else '')]
    return line + (['--engine', args.engine] if args.engine else []) + (['--kvm-irqchip', args.irqchip] if args.irqchip else []) + (['--direct', args.direct, '--stats'] if args.direct else [])


def direct_stops(said):
    return sum(int(stops) for stops in re.findall(r'^direct: cpu .* (\d+) stops,', said, re.MULTILINE))


def run(args):
    with tempfile.TemporaryDirectory() as folder:
        console = os.path.join(folder, 'console')
        process = subprocess.Popen(command(args, console), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            said = process.communicate(timeout=args.seconds)[1]
            status = process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            said = process.communicate()[1]
            status = f'killed after {args.seconds} s'
        try:
            with open(console, encoding='utf-8', errors='replace') as file:
                return status, said, file.read()
        except FileNotFoundError:
            return status, said, ''


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('program')
    parser.add_argument('--doppel', default=os.environ.get('DOPPEL', 'doppel'))
    parser.add_argument('--cpus', type=int, default=1)
    parser.add_argument('--engine')
    parser.add_argument('--irqchip', help='for engine kvm: where local APICs are')
    parser.add_argument('--direct', help='for doppel; and ring 3 is then such that its code can be executed directly')
    parser.add_argument('--seconds', type=float, default=60)
    parser.add_argument('--append', default='', help='for programs with random cases: seed=N')
    parser.add_argument('--qemu', action='store_true')
    parser.add_argument('--qemu-program', default='qemu-system-x86_64')
    parser.add_argument('--qemu-cpu', default='max')
    parser.add_argument('--verbose', action='store_true')
    args = parser.parse_args()

    status, said, output = run(args)
    sys.stderr.write(said)
    if args.engine and f'engine "{args.engine}" needs' in said:
        return 77
    if args.direct == 'always' and 'user code is translated, not executed directly' in said:
        return 77
    lines = output.replace('\r', '').splitlines()
    bad = [line for line in lines if line.startswith('not ok')]
    why = [line for line in lines if line.startswith(('not ok', '#'))]
    good = [line for line in lines if line.startswith('ok')]
    done = [line for line in lines if re.fullmatch(r'DONE \d+ failures', line)]
    stops = direct_stops(said)
    indirect = args.direct == 'always' and not stops
    for line in lines if args.verbose or not done else why if bad else []:
        print(line)
    print(f'{len(good)} ok, {len(bad)} not ok, {"done" if done else "NOT FINISHED"}, exit status {status}' + (f', {stops} stops of direct execution' if args.direct else ''))
    return 0 if not indirect and good and not bad and done and done[-1] == 'DONE 0 failures' and status == 0 else 1


if __name__ == '__main__':
    sys.exit(main())
