//! The lab: a hypervisor, its guests and their network on one machine, for tests and for people
//! (`fence-lab`).
//!
//! * [`lab`]: a hypervisor in namespaces of its own (network, mounts, processes, cgroups) and
//!   network-only guests. A lab has no names on the host, so labs do not meet, and the kernel
//!   removes them when their owner ends.
//! * [`cable`]: connections between hypervisors.
//! * [`process`]: processes of a lab, which end with the value that stands for them.
//! * [`client`]: the stock `fence_xvm`; [`server`]: `fence-daemon`, or fence_virtd for comparison.
//! * [`packaged`]: the configuration file of Debian's package.
//! * [`peer`]: a client of our own, which signs like a stock one and can misbehave.
//! * [`flood`]: a guest that sends as fast as it can, from any source.
//! * [`loaded`]: the kernel program alone, run on given frames.
//! * [`timings`]: a parser of the daemon's line about a fence.
//! * [`kernel`]: the attached XDP program and its counters.
//! * [`libvirtd`]: a real libvirtd in a lab; [`qemu`], [`machine`] and [`container`]: its machines;
//!   [`witness`]: whether a machine's processes are dead, by the kernel's word.
//! * [`testdriver`]: domains of libvirt's in-process driver; [`differences`]: where fence_virtd
//!   differs.
//! * [`observer`]: asks for fences and judges each success by the kernel's word alone.
//! * [`initramfs`]: the small Linux system of QEMU guests, an [`archive`], and [`debian`]'s
//!   kernels.
//! * [`cluster`]: real clusters with corosync and Pacemaker; [`corosync`]: hypervisors that are
//!   one.
//! * [`interrupt`]: Ctrl-C for programs that keep a lab up.
//! * [`pump`]: bytes through TCP from one place to another.
//! * [`systemd`]: a hypervisor with a real systemd, from an image; [`guide`]: the pages of docs,
//!   typed on it.
//! * [`worker`]: a thread that works beside a test; [`board`]: a value that threads wait for.
//! * [`program`]: what the programs below `bin` share.
//! * [`tools`]: the programs of the host that the lab needs, and their packages.
//!
//! Errors are for people: each says what failed, and names the remedy if something is missing. Doc
//! comments mention only errors that are not obvious.

pub mod archive;
pub mod board;
pub mod cable;
pub mod client;
pub mod cluster;
pub mod container;
pub mod corosync;
pub mod debian;
pub mod differences;
pub mod flood;
pub mod guide;
pub mod initramfs;
pub mod interrupt;
pub mod kernel;
pub mod lab;
pub mod libvirtd;
pub mod line;
pub mod loaded;
pub mod machine;
pub mod observer;
pub mod packaged;
pub mod peer;
pub mod process;
pub mod program;
pub mod pump;
pub mod qemu;
pub mod server;
pub mod systemd;
pub mod testdriver;
pub mod timings;
pub mod tools;
pub mod witness;
pub mod worker;
