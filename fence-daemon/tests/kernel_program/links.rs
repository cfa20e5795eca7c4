//! The kernel's messages about links. No change is lost for good when there are more messages than
//! the socket's buffer holds.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use fence_common::wire::DEFAULT_PORT;
use fence_daemon::intake::follower::Follower;
use fence_daemon::intake::kernel::Mode;
use fence_daemon::intake::links::{Changes, Links};
use fence_daemon::intake::memberships::Memberships;
use fence_daemon::intake::socket::{RequestSocket, SocketError};
use fence_net::interface::Wanted;

use crate::attach::route_multicast;
use crate::bench::{RULES, in_namespace, ip, key, load};

const GROUP: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(225, 0, 0, 12));

/// All changes that the kernel has reported by now.
async fn told(links: &mut Links) -> Changes {
    let mut all = Changes::default();
    while let Ok(changes) = tokio::time::timeout(Duration::from_millis(200), links.next()).await {
        all.everything |= changes.everything;
        all.gone.extend(changes.gone);
        all.touched.extend(changes.touched);
    }
    all
}

fn number_of(interface: &str) -> u32 {
    nix::net::if_::if_nametoindex(interface).unwrap()
}

fn with_links(test: impl AsyncFnOnce(Links)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { test(Links::open(GROUP).unwrap()).await });
}

#[test]
fn link_changes_are_reported_by_index() {
    in_namespace(|| {
        with_links(async |mut links| {
            // The kernel may still report addresses that it has made in the new namespace. None of
            // these is a loss.
            let changes = told(&mut links).await;
            assert!(changes.gone.is_empty() && !changes.everything, "{changes:?}");
            ip("link set virbr0 down");
            let (bridge, port) = (number_of("virbr0"), number_of("port0"));
            let changes = told(&mut links).await;
            assert!(changes.touched.contains(&bridge) && changes.gone.is_empty(), "{changes:?}");
            // A port that joins and leaves a bridge is still the same interface.
            ip("link set port0 master virbr0");
            ip("link set port0 nomaster");
            let changes = told(&mut links).await;
            assert!(changes.touched.contains(&port) && changes.gone.is_empty(), "{changes:?}");
            ip("link add top0 link virbr0 type macvlan");
            assert!(told(&mut links).await.touched.contains(&bridge));
            ip("link del virbr0");
            ip(&format!("link add virbr0 index {bridge} type bridge"));
            let changes = told(&mut links).await;
            assert!(
                changes.gone.contains(&bridge) && !changes.gone.contains(&port) && !changes.everything,
                "{changes:?}"
            );
        });
    });
}

#[test]
fn an_address_is_reported() {
    in_namespace(|| {
        with_links(async |mut links| {
            told(&mut links).await;
            ip("addr add 192.168.122.1/24 dev virbr0");
            let changes = tokio::time::timeout(Duration::from_secs(10), links.next()).await;
            assert!(changes.is_ok(), "nothing told");
        });
    });
}

#[test]
fn an_overflow_makes_everything_doubtful_and_the_listening_goes_on() {
    in_namespace(|| {
        with_links(async |mut links| {
            // Unread messages beyond the largest default buffer.
            let batch: String = (0..400).map(|n| format!("link set virbr0 txqueuelen {}\n", 900 + n % 7)).collect();
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(&file, batch).unwrap();
            ip(&format!("-batch {}", file.path().display()));
            assert!(told(&mut links).await.everything);
            ip("link set virbr0 down");
            let changes = told(&mut links).await;
            assert!(!changes.everything && changes.touched.contains(&number_of("virbr0")), "{changes:?}");
        });
    });
}

/// The socket. A process that another test forks may hold the previous socket until it executes its
/// program.
fn open_socket() -> RequestSocket {
    let mut tries = 0..1000;
    loop {
        match RequestSocket::open(GROUP, DEFAULT_PORT, RULES, Some(key())) {
            Err(SocketError::PortTaken(..)) if tries.next().is_some() => std::thread::sleep(Duration::from_millis(10)),
            result => return result.unwrap(),
        }
    }
}

/// The listener on its interface, as in the daemon. Without the kernel's messages it notices
/// changes a little later.
#[test]
fn a_bridge_that_comes_late_and_is_recreated_is_followed_with_and_without_messages() {
    in_namespace(|| {
        ip("link del virbr0");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            for messages in [true, false] {
                let socket = Arc::new(open_socket());
                let links = if messages { Links::open(GROUP).unwrap() } else { Links::by_looking() };
                let program = Some((load(), Mode::Auto));
                let mut memberships =
                    Memberships::new(Wanted::Named("virbr0".to_owned()), Arc::clone(&socket), program);
                assert!(memberships.complain().unwrap().contains("virsh net-start"));
                let mut follower = Follower::start(memberships, links);
                let early = tokio::time::timeout(Duration::from_millis(300), follower.heard()).await;
                assert!(early.is_err(), "{early:?}");
                for _ in 0..2 {
                    ip("link add virbr0 type bridge");
                    ip("link set virbr0 up");
                    let heard = tokio::time::timeout(Duration::from_secs(30), follower.heard()).await.unwrap().unwrap();
                    assert_eq!((heard.names().as_str(), heard.ways().as_str()), ("virbr0", "generic"));
                    assert!(ip("link show virbr0").contains("xdpgeneric"), "{}", follower.status());
                    ip("link del virbr0");
                    while follower.status().contains("serving") {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
                assert!(follower.end().await.is_some());
            }
        });
    });
}

#[test]
fn while_multicast_is_routed_from_the_bridge_the_program_is_off() {
    in_namespace(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let socket = Arc::new(open_socket());
            let program = Some((load(), Mode::Auto));
            let memberships = Memberships::new(Wanted::Named("virbr0".to_owned()), socket, program);
            let mut follower = Follower::start(memberships, Links::open(GROUP).unwrap());
            assert_eq!(follower.heard().await.unwrap().ways(), "generic");
            let becomes = async |words: &str| {
                for _ in 0..1500 {
                    if follower.status().contains(words) {
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                panic!("never {words}: {}", follower.status());
            };
            let router = route_multicast("virbr0");
            becomes("through the socket").await;
            drop(router);
            becomes("(xdp generic)").await;
        });
    });
}
