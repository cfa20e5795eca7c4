//! Traffic that has nothing to do with fencing. TCP carries a file unharmed, in large frames and in
//! small ones, with the program attached in every way, while guests are served.

use anyhow::{Context, Result, ensure};
use fence_bench::bystanders::{Direction, Frames, Ground, Road, Way};
use fence_lab::client::Client;
use fence_lab::pump;
use fence_lab::server::Which;
use fence_lab::tools;

use crate::bench::DOMAIN;

/// Long enough for every TCP window size and every segmentation.
const FILE: usize = 64 * 1024 * 1024;

fn passes(road: Road, way: Way) -> Result<()> {
    let ground = Ground::new()?;
    let file = tools::random_bytes(FILE)?;
    let server = ground.serve(&Which::ours()?, road, way)?.context("no server")?;
    for frames in Frames::ALL {
        ground.set(road, frames)?;
        for direction in [Direction::ToHost, Direction::ToGuest] {
            let what = format!("{}, {frames:?}, {direction:?}", way.name());
            let (from, to, address) = ground.ends(road, direction);
            let before = ground.received(road)?;
            pump::transfer(from, to, address, &file).with_context(|| what.clone())?;
            let after = ground.received(road)?;
            ensure!(ground.wrong_checksums()? == 0, "{what}: wrong checksums");
            if direction == Direction::ToHost && way != Way::Native {
                // The frames had the sizes that this case is about, as the program saw them.
                let mean = (after[1] - before[1]) / (after[0] - before[0]).max(1);
                let whole = u64::from(frames.mtu) + 14;
                ensure!((mean > whole) == frames.joined, "{what}: {mean} bytes a frame");
                ensure!(frames.joined || mean > whole / 2, "{what}: {mean} bytes a frame");
            }
        }
        // The program works meanwhile.
        let position = server.log_position();
        let client = Client::new("status", ground.key()).domain(DOMAIN).retransmit(2);
        let answer = client.run(ground.guest(road).space())?;
        ensure!(answer.code == Some(0), "{}, {frames:?}: {answer:?}: {}", way.name(), server.log());
        ensure!(server.next_fence(position)?.get("via") == Some("kernel"), "{}", server.log());
    }
    Ok(())
}

#[test]
fn a_file_passes_the_bridge_with_tcx() -> Result<()> {
    passes(Road::Bridge, Way::Tcx)
}

#[test]
fn a_file_passes_the_bridge_with_generic_xdp() -> Result<()> {
    passes(Road::Bridge, Way::Generic)
}

#[test]
fn a_file_passes_a_cable_with_native_xdp() -> Result<()> {
    passes(Road::Cable, Way::Native)
}
