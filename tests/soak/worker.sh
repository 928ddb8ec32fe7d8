# Runs in the guest on its console: answers to lines of the host's `run`. "job ID NAME VARIANT" runs a job in the background and says "@done ID STATUS SHA256 MS";
# "show ID" prints what it printed; "health" what the kernel thinks of it all; "off" ends the machine.
tree=/mnt
PATH=/usr/sbin:/usr/bin:/sbin:/bin
stamp() { read -r up rest </proc/uptime; echo "${up%.*}${up#*.}0"; }

job() {
    mkdir -p "$tree/scratch/$1"
    began=$(stamp)
    chroot "$tree" sh -c 'cd /scratch/$1 && SOAK_SERVER=$4 exec sh /soak/jobs.sh $2 $3' sh "$1" "$2" "$3" "$server" >"$tree/scratch/$1.out" 2>"$tree/scratch/$1.err"
    status=$?
    sum=$(chroot "$tree" sha256sum <"$tree/scratch/$1.out")
    echo "@done $1 $status ${sum%% *} $(($(stamp) - began)) "
    # What failed stays; the host asks for the rest by itself.
}

show() {
    echo "@output $1"
    for part in out err; do
        head -c 100000 "$tree/scratch/$1.$part" | gzip -c | base64
        echo "@end"
    done
}

server=$1
stty -echo
echo "@ready"
while read -r verb id name variant; do
    case $verb in
    job) job "$id" "$name" "$variant" & ;;
    show) show "$id" ;;
    forget) rm -rf "$tree/scratch/$id" "$tree/scratch/$id.out" "$tree/scratch/$id.err" ;;
    health)
        echo "@health $(date +%s.%N) $(cut -d' ' -f1-3 /proc/loadavg)"
        dmesg
        echo "@end"
        ;;
    off)
        sync
        umount "$tree/soak" "$tree/proc" "$tree/dev/pts" "$tree/dev/shm" "$tree/dev" "$tree"
        poweroff
        ;;
    esac
done
