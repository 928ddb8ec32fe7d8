#!/usr/bin/env python3
"""The lockstep test finds deliberate errors, and where they are: errors.py CONFORM_LOCKSTEP PROGRAM."""
import re
import subprocess
import sys

EVENT = 2000
# what is changed: what the report has to say
ERRORS = {
    f'{EVENT}:12': [r'\bR12 +interp \w+  bt \w+', rf'\d+ after event {EVENT}; executed'],
    f'{EVENT}:@0x2800000': [r'memory at gpa 0x2800000  interp 0+  bt 0*1$', rf'at step \d+ after event {EVENT}, between'],
}


def main():
    lockstep, program = sys.argv[1:]
    wrong = 0
    for error, wanted in ERRORS.items():
        done = subprocess.run([lockstep, '--kernel', program, '--memory', '64M', '--ram', '1000', '--error', error, '--expect-error'], capture_output=True, text=True)
        if done.returncode == 77:
            print(done.stdout)
            return 77
        made = re.search(r'error made: at 0x(\w+)', done.stderr)
        if made: # the step from which on all is different
            wanted = wanted + [rf'> 0*{made[1]} ']
        missing = [pattern for pattern in wanted if not re.search(pattern, done.stdout, re.MULTILINE)]
        if done.returncode or not made or missing:
            wrong += 1
            print(f'{error}: exit status {done.returncode}, not found in the report: {missing}\n{done.stdout}{done.stderr}')
    return wrong != 0


if __name__ == '__main__':
    sys.exit(main())
