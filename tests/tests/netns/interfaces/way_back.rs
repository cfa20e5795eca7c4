//! The callback leaves by the interface that the request came by, whatever the routing table says.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_common::wire::{Op, Reply};
use fence_lab::client::Family;
use fence_lab::lab::Guest;
use fence_lab::peer::Peer;
use fence_lab::server::{Config, Server};

use super::{Way, wait_line};
use crate::bench::{Bench, DOMAIN, key};
use crate::operations::UUID;

/// A second bridge, with the same subnets as the first one.
const SECOND: &str = "virbr1";

/// A hypervisor with a guest on each of two bridges that have the same addresses.
struct Twins {
    bench: Bench,
    second: Guest,
}

impl Twins {
    fn new() -> Result<Self> {
        let bench = Bench::new()?;
        let second = bench.hypervisor.guest(2)?;
        let twins = Self { bench, second };
        twins.ip(&format!("link add {SECOND} type bridge forward_delay 0"))?;
        twins.ip(&format!("link set {SECOND} up"))?;
        twins.ip(&format!("link set vnet2 master {SECOND}"))?;
        twins.ip(&format!("addr add 192.168.122.1/24 dev {SECOND}"))?;
        twins.ip(&format!("addr add fd00:122::1/64 dev {SECOND} nodad"))?;
        Ok(twins)
    }

    fn ip(&self, arguments: &str) -> Result<()> {
        self.bench.hypervisor.ip(&arguments.split(' ').collect::<Vec<_>>()).map(drop)
    }

    fn serve(&self, way: Way) -> Result<Server> {
        self.bench.serve(&Config { interface: "none".to_owned(), ..way.config(&self.bench) })
    }

    /// Each guest in turn sends a request and is answered.
    fn both_are_served(&self, server: &Server, way: Way) -> Result<()> {
        for guest in [&self.bench.guest, &self.second] {
            let client = way.status(&self.bench).retransmit(2).timeout(6);
            self.bench.expect(server, guest.space(), &client, 0).with_context(|| format!("{way:?}"))?;
        }
        Ok(())
    }
}

#[test]
fn two_bridges_with_one_subnet_are_both_called_back() -> Result<()> {
    for way in Way::ALL {
        let twins = Twins::new()?;
        let server = twins.serve(way)?;
        twins.both_are_served(&server, way)?;
    }
    Ok(())
}

/// Two guests with the same address: each is called back on its own bridge, also while the other
/// one's request is in work.
#[test]
fn two_guests_with_one_address_are_told_apart() -> Result<()> {
    for way in Way::ALL {
        let twins = Twins::new()?;
        let change =
            |arguments: String| twins.second.space().must("ip", &arguments.split(' ').collect::<Vec<_>>()).map(drop);
        match way.family {
            Family::V4 => {
                change("addr del 192.168.122.12/24 dev eth0".to_owned())?;
                change("addr add 192.168.122.11/24 dev eth0".to_owned())?;
                change("route replace 224.0.0.0/4 dev eth0".to_owned())?;
            }
            Family::V6 => {
                change("addr del fd00:122::12/64 dev eth0".to_owned())?;
                change("addr add fd00:122::11/64 dev eth0 nodad".to_owned())?;
            }
        }
        let server = twins.serve(way)?;
        twins.both_are_served(&server, way)?;
        // By name and by UUID. The clients' numbers are microseconds. Two requests of one address
        // and one number for one domain would be one request.
        let asks = [(&twins.bench.guest, DOMAIN), (&twins.second, UUID)];
        let client = |domain: &str| way.status_of(&twins.bench, domain).retransmit(2).timeout(10);
        for _ in 0..3 {
            let running = asks.map(|(guest, domain)| client(domain).start(guest.space()));
            for process in running {
                let ended = process?.finish(super::NOTICE)?;
                ensure!(ended.code == Some(0), "{way:?}: {ended:?}\n{}", server.log());
            }
        }
    }
    Ok(())
}

/// A guest behind a router: the route to it uses another interface than its requests come by.
#[test]
fn where_no_route_leads_back_the_routing_table_decides() -> Result<()> {
    let bench = Bench::new()?;
    let ip = |arguments: &str| bench.hypervisor.ip(&arguments.split(' ').collect::<Vec<_>>()).map(drop);
    let inside = |arguments: &str| bench.guest.space().must("ip", &arguments.split(' ').collect::<Vec<_>>()).map(drop);
    ip(&format!("link add port9 type veth peer name eth9 netns {}", bench.guest.name))?;
    ip("addr add 192.168.123.1/24 dev port9")?;
    ip("link set port9 up")?;
    inside("addr add 192.168.123.11/24 dev eth9")?;
    inside("link set eth9 up")?;
    for attach in ["auto", "off"] {
        let config = Config { strict_source: Some("no"), ..bench.config(attach) };
        let _server = bench.serve(&config)?;
        let front = Peer::new(&bench.guest, &key(), Family::V4)?;
        let behind = Peer::at(bench.guest.space(), "192.168.123.11".parse()?, &key())?;
        front.send(behind.request(Op::Status, DOMAIN)?)?;
        let mut call = behind.called_back(super::NOTICE)?.context("nobody called back")?;
        ensure!(call.converse()? == Reply::Success.to_wire());
    }
    Ok(())
}

/// Once the interface is gone, the holder of that address on another interface is a different
/// guest.
#[test]
fn nobody_else_is_called_back_when_the_interface_is_gone() -> Result<()> {
    let twins = Twins::new()?;
    let second = |arguments: &str| twins.second.space().must("ip", &arguments.split(' ').collect::<Vec<_>>()).map(drop);
    second("addr del 192.168.122.12/24 dev eth0")?;
    second("addr add 192.168.122.11/24 dev eth0")?;
    second("route replace 224.0.0.0/4 dev eth0")?;
    let server = twins.serve(Way::ALL[0])?;
    let listener = Peer::at(twins.bench.guest.space(), "192.168.122.11".parse()?, &key())?;
    let gone = Peer::at(twins.second.space(), "192.168.122.11".parse()?, &key())?;
    // The callback for an unknown domain is made after 1.5 s.
    let mut request = gone.request(Op::Off, "nobody")?;
    request.port = listener.port()?.into();
    let position = server.log_position();
    gone.send(request)?;
    std::thread::sleep(Duration::from_millis(300));
    twins.ip(&format!("link del {SECOND}"))?;
    wait_line(&server, position, &["the interface that the request came by is gone or down"])?;
    ensure!(listener.called_back(Duration::from_millis(500))?.is_none(), "somebody else was called back");
    Ok(())
}
