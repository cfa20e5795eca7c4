//! Every pair of digests that a server can have, over both address families, against clients with
//! every pair.

use fence_common::hash::HashKind;
use fence_common::wire::Op;
use fence_lab::client::{Client, Family};
use fence_lab::testdriver::{State, TestDomain, uuid};

use crate::scene::{Case, Expected, Scene, Stage};
use crate::talk;

pub(crate) fn scenes() -> Vec<Scene> {
    let mut scenes = Vec::new();
    for family in [Family::V4, Family::V6] {
        for hash in HashKind::ALL {
            for auth in HashKind::ALL {
                scenes.push(scene(family, hash, auth));
            }
        }
    }
    scenes
}

/// Whether a server accepts requests with this digest. A server that demands neither digest nor
/// authentication reads no key, and can verify none.
fn taken(hash: HashKind, auth: HashKind, of_client: HashKind) -> bool {
    let has_key = (hash, auth) != (HashKind::None, HashKind::None);
    of_client.to_wire() >= hash.to_wire() && (has_key || of_client == HashKind::None)
}

fn scene(family: Family, hash: HashKind, auth: HashKind) -> Scene {
    let (mut cases, mut domains) = (Vec::new(), Vec::new());
    for client_hash in HashKind::ALL {
        for client_auth in HashKind::ALL {
            let name = format!("raw-{}-{}", client_hash.name(), client_auth.name());
            domains.push(TestDomain::new(&name, &uuid(domains.len() + 1), State::Running));
            let expected = match (taken(hash, auth, client_hash), client_auth == auth) {
                (false, _) => format!("{}, then running", talk::SILENCE),
                (true, true) => "reply 0, then off".to_owned(),
                // A server without authentication acts at once, and its reply does not answer the
                // client's challenge.
                (true, false) if auth == HashKind::None => format!("{}, then off", talk::NO_REPLY),
                (true, false) => format!("{}, then running", talk::NO_REPLY),
            };
            let domain = name.clone();
            let case = Case::new(name.clone(), Expected::both(expected), move |stage, watched| {
                let peer = stage.peer(1)?.with_digests(client_hash, client_auth);
                let request = peer.request(Op::Off, &domain)?;
                let text = if !taken(hash, auth, client_hash) {
                    // Silence is only certain at the end of the scene.
                    peer.send(request)?;
                    talk::SILENCE.to_owned()
                } else {
                    talk::sent(&peer, request, client_auth)?
                };
                watched.push(peer);
                Ok(text)
            });
            cases.push(case.and_state_of(name));
        }
    }
    for op in Op::ALL {
        let name = format!("client-{}", op.name());
        domains.push(TestDomain::new(&name, &uuid(domains.len() + 1), State::Running));
        let domain = name.clone();
        let case = Case::new(name.clone(), Expected::Same, move |stage: &Stage, _: &mut Vec<_>| {
            let client = Client::new(op.name(), &stage.config.key_file).family(family).hash(hash).auth(auth);
            let client = if op.names_a_domain() { client.domain(&domain) } else { client };
            let text = talk::ran(stage, 1, &client)?;
            // The states of the other domains change meanwhile.
            Ok(if op == Op::HostList { text.replace(" off", " on") } else { text })
        });
        cases.push(case.and_state_of(name));
    }
    let name = format!("digests-{}-{}-{}", family.name(), hash.name(), auth.name());
    Scene::new(name, domains, cases).configured(move |config, _| {
        (config.family, config.hash, config.auth) = (family, hash, auth);
    })
}
