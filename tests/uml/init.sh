#!/bin/sh
# Process 1 of a User-mode Linux. The kernel's command line gives uml_job=DIRECTORY (on the host) and uml_limit=SECONDS.
# The host's / is mounted read-only by hostfs; what is written goes to a tmpfs over it, and only DIRECTORY is the host's.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
kernel=$(uname -r)
modules=/usr/lib/uml/modules/$kernel
new=/mnt

power_off() {
    [ $# -eq 0 ] || echo "init: failed: $*"
    [ -e /proc/sysrq-trigger ] || mount -t proc proc /proc
    echo o > /proc/sysrq-trigger
    sleep 10
}

# by path, as /lib/modules has nothing of this kernel yet
insmod "$modules/kernel/fs/overlayfs/overlay.ko" || power_off overlay.ko
mount -t tmpfs -o size=90% tmpfs $new && mkdir $new/upper $new/work $new/root || power_off tmpfs
mount -t overlay -o lowerdir=/,upperdir=$new/upper,workdir=$new/work overlay $new/root || power_off overlay
cd $new/root || power_off root
mount -n --move /dev dev
mount -t proc proc proc
mount -t sysfs sys sys
mount -t tmpfs -o mode=755 run run
mkdir -p run/old run/lock run/netns
# not chroot: the helper that loads modules on demand has to see the new root too
pivot_root . run/old || power_off pivot_root
cd /
[ -L /lib/modules ] && rm /lib/modules
mkdir -p "/lib/modules/$kernel" /dev/pts /dev/shm "$uml_job"
mount --bind "$modules" "/lib/modules/$kernel"
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t hostfs -o "$uml_job" none "$uml_job" || power_off hostfs
umount -l /run/old
mount --make-rshared /
# ipv6 first: a VXLAN device that goes up loads it under the lock of rtnetlink, and both wait for ever
modprobe -a ipv6 veth sch_ingress cls_bpf
# this kernel has no nf_tables of families ip and ip6
for name in iptables ip6tables; do
    [ -x /usr/sbin/$name-legacy ] && ln -sf $name-legacy /usr/sbin/$name
done
hostname uml
ip link set lo up
ulimit -n 65536
ulimit -l unlimited

cd "$uml_job" || power_off "$uml_job"
setsid timeout -k 3 "$uml_limit" /bin/sh ./command </dev/null >>output 2>&1
echo $? > status.new
dmesg > dmesg
mv status.new status
power_off
