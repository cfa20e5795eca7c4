//! The lab: a hypervisor, its guests and their network as a test (or a person, with `fence-lab`) needs them, on one machine.
//!
//! * [`lab`]: a hypervisor in namespaces of its own (network, mounts, processes, cgroups) and network-only guests. Nothing
//!   of it has a name on the host, so labs do not meet each other, and the kernel removes them when their owner ends.
//! * [`cable`]: what connects hypervisors.
//! * [`process`]: what runs in a lab, ended and waited for with the value that stands for it.
//! * [`client`]: the stock `fence_xvm`; [`server`]: `fence-daemon`, or the stock `fence_virtd` that it is compared with.
//! * [`packaged`]: the configuration file that Debian's package brings.
//! * [`peer`]: a client written here, which signs like a stock one and then misbehaves as told.
//! * [`flood`]: a guest that sends as fast as it can, from any source.
//! * [`loaded`]: that program by itself, run on frames that are given to it.
//! * [`differential`]: that program against user space, on frames made from real ones.
//! * [`timings`]: reads the daemon's line about a fence.
//! * [`kernel`]: which XDP program is attached, and what it has counted.
//! * [`libvirtd`]: a real libvirtd inside a lab; [`qemu`], [`machine`] and [`container`]: its machines; [`witness`]: whether a machine's
//!   processes are dead, whatever libvirt says.
//! * [`testdriver`]: domains of libvirt's in-process driver; [`differences`]: what the stock server does otherwise.
//! * [`fuse`]: a disk whose server answers when the test says so, which keeps a machine that uses it from dying; [`block`]: a block device on it.
//! * [`observer`]: asks for fences and judges each success by the kernel's word alone.
//! * [`initramfs`]: the small Linux system with the stock client that QEMU guests boot, an [`archive`], and [`debian`]'s kernels.
//! * [`cluster`]: real clusters of nodes with corosync and Pacemaker.
//! * [`interrupt`]: Ctrl-C for programs that keep a lab up.
//! * [`pump`]: bytes through TCP from one place to another.
//! * [`guide`]: the guides in docs, taken apart and typed.
//! * [`program`]: what the programs below `bin` have in common.
//! * [`systemd`]: a hypervisor that the real systemd has booted.
//! * [`tools`]: the programs of the host that all of this needs, and how to get them.

pub mod archive;
pub mod block;
pub mod cable;
pub mod client;
pub mod cluster;
pub mod container;
pub mod debian;
pub mod differences;
pub mod differential;
pub mod flood;
pub mod fuse;
pub mod guide;
pub mod initramfs;
pub mod interrupt;
pub mod kernel;
pub mod lab;
pub mod libvirtd;
pub mod loaded;
pub mod machine;
pub mod observer;
pub mod packaged;
pub mod peer;
pub mod process;
pub mod program;
pub mod proxy;
pub mod pump;
pub mod qemu;
pub mod server;
pub mod systemd;
pub mod testdriver;
pub mod timings;
pub mod tools;
pub mod witness;
