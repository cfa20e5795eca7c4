//! A guest with a vsock of its own: QEMU in a guest, so that the hypervisor at the other end is not
//! somebody else's. The daemon knows the guest's domain by its CID, and the guest types what
//! `docs/guide/ways-in.md` says about vsock.
//!
//! The outer guest has the kernel's vhost_vsock, as a hypervisor has. A domain of libvirt's test
//! driver has the CID of the QEMU that it runs.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use fence_lab::archive::{self, Archive};
use fence_lab::debian::{Kernel, Series};
use fence_lab::testdriver::{State, TestDomain, node, uuid};
use fence_lab::{initramfs, tools};

use crate::guest::{self, Extra, Step};

/// In the order of loading.
const MODULES: [&str; 5] = [
    "net/vmw_vsock/vsock.ko",
    "net/vmw_vsock/vmw_vsock_virtio_transport_common.ko",
    "drivers/vhost/vhost_iotlb.ko",
    "drivers/vhost/vhost.ko",
    "drivers/vhost/vhost_vsock.ko",
];
/// What the inner guest needs beside what a PCI device needs.
const INNER_MODULES: [&str; 3] = [
    "net/vmw_vsock/vsock.ko",
    "net/vmw_vsock/vmw_vsock_virtio_transport_common.ko",
    "net/vmw_vsock/vmw_vsock_virtio_transport.ko",
];
/// How many of [`initramfs::MODULES`] that is.
const PCI: usize = 5;
/// The number of the inner guest's vsock.
const CID: u32 = 7;
/// The domain that it is, as the page calls it.
const ME: &str = "web-one";
const PROMPT: &str = "root@web-one:~# ";
const PAGE: &str = "docs/guide/ways-in.md";
/// The page's file of the hypervisor begins with this.
const FILE: &str = "listeners { multicast { interface = \"virbr0\"; } vsock { } }";

/// Runs the daemon, and the inner guest until it ends.
const SCRIPT: &str = "
fence-daemon -F -f /web.conf -p /tmp/pid > /tmp/log 2>&1 &
server=$!
until fence-daemon -f /web.conf status | grep -q 'vsock'; do sleep 0.2; done
timeout 1000 qemu-system-x86_64 -L /firmware -accel tcg -M pc -m 96 -nodefaults -no-user-config -no-reboot \
    -display none -serial stdio -kernel /inner.kernel -initrd /inner.initrd \
    -append 'console=ttyS0 quiet panic=-1 mitigations=off tsc=unstable cryptomgr.notests' \
    -device vhost-vsock-pci,guest-cid=7
kill $server
wait $server
cat /tmp/log
";

/// A command of the page, and what it prints.
struct Typed {
    command: String,
    shown: Vec<String>,
}

/// What the page has the guest type.
fn typed(page: &str) -> Vec<Typed> {
    let mut typed: Vec<Typed> = Vec::new();
    let mut is_block = false;
    for line in page.lines() {
        if let Some(info) = line.strip_prefix("```") {
            is_block = info == "console";
        } else if let Some(command) = line.strip_prefix(PROMPT).filter(|_| is_block) {
            typed.push(Typed { command: command.to_owned(), shown: Vec::new() });
        } else if let Some(last) = typed.last_mut().filter(|_| is_block) {
            last.shown.push(line.to_owned());
        }
    }
    typed
}

/// What is asked after that, with the exit code: as Pacemaker does, by the plugin, and what the
/// groups do not permit.
const MORE: [(&str, i32); 6] = [
    ("fence_virt -S2 -o off -H web-two", 0),
    ("fence_virt -S2 -o status -H web-two", 2),
    ("fence_virt -S2 -o off -H other", 3),
    ("printf 'action=on\\nvsock=2\\nport=web-two\\n' | fence_virt", 0),
    ("hostlist=beta:web-two vsock=2 sh /plugin reset beta", 0),
    ("hostlist=beta:web-two vsock=2 sh /plugin off beta", 0),
];

/// The first program of the inner guest: runs the commands, and says how each ended.
fn inner_init(modules: &[&str], commands: &[&str]) -> String {
    let mut init = "#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
"
    .to_owned();
    for module in modules {
        let _ = writeln!(init, "insmod /modules/{module}");
    }
    for (number, command) in commands.iter().enumerate() {
        let _ = writeln!(
            init,
            "words=$({{ {command}; }} 2>&1)\necho \"@typed {number} $? $(echo \"$words\" | tr '\\n' '|')\""
        );
    }
    init + "reboot -f\n"
}

fn inner_initrd(kernel: &Kernel, key: &str, commands: &[&str]) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    let pci = initramfs::MODULES.iter().take(PCI);
    let modules = archive.modules(kernel, pci.chain(&INNER_MODULES))?;
    archive.file("init", 0o755, inner_init(&modules, commands).as_bytes());
    archive.file(initramfs::KEY, 0o600, key.as_bytes());
    archive.copy(&tools::find("busybox")?, "/bin/busybox", 0o755)?;
    archive.copy(&plugin(), "/plugin", 0o644)?;
    let client = tools::find("fence_virt")?;
    archive.copy(&client, "/usr/sbin/fence_virt", 0o755)?;
    let mut libraries = archive::libraries(&client)?;
    libraries.extend(initramfs::nss(&libraries)?);
    for library in libraries {
        archive.copy(&library, &library.to_string_lossy(), 0o755)?;
    }
    ["proc", "sys", "dev", "tmp", "run"].iter().for_each(|directory| archive.directory(directory));
    Ok(archive.finish())
}

fn plugin() -> PathBuf {
    tools::workspace().join("dist/stonith/external/fence-xdp")
}

/// What QEMU loads at run time.
fn qemu_modules() -> Result<Vec<PathBuf>> {
    let folder = Path::new("/usr/lib/x86_64-linux-gnu/qemu");
    let names = ["accel-tcg-i386.so", "accel-tcg-x86_64.so"].map(|name| folder.join(name));
    let found: Vec<_> = names.into_iter().filter(|path| path.exists()).collect();
    ensure!(!found.is_empty(), "no modules of QEMU in {}: run `cargo xtask setup --for test`", folder.display());
    Ok(found)
}

/// The first of these firmware files that there is.
fn firmware(name: &str) -> Result<PathBuf> {
    let folders = ["/usr/share/seabios", "/usr/share/qemu"].map(|folder| Path::new(folder).join(name));
    folders.into_iter().find(|path| path.exists()).with_context(|| format!("QEMU's {name} is missing"))
}

#[test]
fn a_guest_with_a_number_of_its_own_asks_as_the_page_says() -> Result<()> {
    let page = std::fs::read_to_string(tools::workspace().join(PAGE))?;
    let typed = typed(&page);
    ensure!(!typed.is_empty(), "{PAGE} has nothing for {PROMPT}");
    let commands: Vec<_> = typed.iter().map(|typed| typed.command.as_str()).chain(MORE.map(|(line, _)| line)).collect();
    // The page's own file: with libvirt's test driver, as QEMU's driver takes a machine of its own.
    let (_, file) = page.split_once("```conf root@host1:/etc/fence_virt.conf\n").context("no file of host1")?;
    let (file, _) = file.split_once("```").context("the block does not end")?;
    ensure!(file.contains(FILE), "the page's file is another one: {file}");
    let config = format!("{file}backends {{ libvirt {{ uri = \"test:///node.xml\"; }} }}\n");

    let kernel = Kernel::get(Series::Linux6_1)?;
    let key = "the key of this test, of some length";
    let scratch = tempfile::tempdir()?;
    let inner = scratch.path().join("inner");
    std::fs::write(&inner, inner_initrd(&kernel, key, &commands)?)?;
    let running = |name, number| TestDomain::new(name, &uuid(number), State::Running);
    let mut me = running(ME, 1);
    let _ = write!(me.devices, "<vsock model='virtio'><cid auto='no' address='{CID}'/></vsock>");
    let domains = [me, running("web-two", 2), running("other", 3)];
    let extra = Extra {
        modules: &MODULES,
        programs: &["qemu-system-x86_64"],
        libraries: qemu_modules()?,
        files: vec![
            ("/nested.sh", SCRIPT.to_owned()),
            ("/node.xml", node(&domains)),
            (initramfs::KEY, key.to_owned()),
            ("/web.conf", config),
        ],
        copies: vec![
            (kernel.image.clone(), "/inner.kernel"),
            (inner, "/inner.initrd"),
            (firmware("bios-256k.bin")?, "/firmware/bios-256k.bin"),
            (firmware("linuxboot_dma.bin")?, "/firmware/linuxboot_dma.bin"),
        ],
    };
    let steps = [Step { name: "nested", command: "sh /nested.sh".to_owned() }];
    let initrd = scratch.path().join("initrd");
    let programs = guest::executables()?;
    std::fs::write(&initrd, guest::initrd(&kernel, &programs, &extra, &steps, scratch.path())?)?;
    let done = guest::run(&kernel, &initrd, &steps)?;
    let done = done.first().context("no step")?;

    let said: Vec<_> = done.output.iter().filter_map(|line| line.split_once("@typed ")).map(|(_, said)| said).collect();
    ensure!(said.len() == commands.len(), "{:#?}", done.output);
    for (number, command) in commands.iter().enumerate() {
        let (code, words) = said
            .get(number)
            .and_then(|said| said.strip_prefix(&format!("{number} "))?.split_once(' '))
            .with_context(|| format!("no word about {command}: {:#?}", done.output))?;
        let code: i32 = code.parse()?;
        eprintln!("{command}: {code} {words}");
        if let Some(typed) = typed.get(number) {
            let words: Vec<_> = words.split('|').map(str::trim_end).filter(|line| !line.is_empty()).collect();
            ensure!(code == 0 && words == typed.shown, "{command}: {code} {words:?}: {:#?}", done.output);
        } else {
            let expected = MORE.get(number - typed.len()).context("one command too many")?.1;
            ensure!(code == expected, "{command}: {code} instead of {expected}: {:#?}", done.output);
        }
    }
    let sources: BTreeSet<_> = done
        .output
        .iter()
        .filter(|line| line.contains("via=vsock"))
        .map(|line| line.contains("source=\"web-one (CID 7)\"") || line.contains("source=web-one (CID 7)"))
        .collect();
    ensure!(sources == [true].into(), "the log does not say who asked: {:#?}", done.output);
    Ok(())
}
