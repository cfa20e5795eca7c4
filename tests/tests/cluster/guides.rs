//! What the guides in docs say, typed.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use fence_tests::guide::stage::Stage;
use fence_tests::lab::Hypervisor;
use fence_tests::libvirtd::Libvirtd;

#[test]
fn scratch() -> Result<()> {
    let image = PathBuf::from("/work/img/root");
    let hypervisor = Hypervisor::new()?;
    let _libvirtd = Libvirtd::start(&hypervisor)?;
    let _stage = Stage::new(&hypervisor, &image)?;
    std::fs::write("/tmp/gui-holder", hypervisor.holder().to_string())?;
    while !std::path::Path::new("/tmp/gui-stop").exists() {
        std::thread::sleep(Duration::from_millis(300));
    }
    std::fs::remove_file("/tmp/gui-stop")?;
    Ok(())
}
