//! scratch
use super::*;
fn show(space: &Space, line: &str) -> Result<()> {
    let line = line.replace("fence-daemon", &program()?);
    let said = run(space, Command::new("sh").args(["-c", &line]), LIMIT)?;
    println!("$ {line}\n{}{}rc={:?} in {:?}", said.stdout, said.stderr, said.code, said.elapsed);
    Ok(())
}
#[test]
fn scratch() -> Result<()> {
    let bench = Bench::new()?;
    let _server = bench.serve(&bench.config("auto"))?;
    let (hv, g) = (bench.hypervisor.space(), bench.guest.space());
    show(hv, "fence-daemon -f /run/lab/fence_virt.conf doctor")?;
    show(g, "fence-daemon doctor --from-guest --key /run/lab/fence.key")?;
    show(g, "fence_xvm -o list -k /run/lab/fence.key -d")?;
    show(g, "fence_xvm -o list -k /run/lab/fence.key -C sha1 -d -t 4")?;
    show(g, "fence_xvm -o list -k /run/lab/fence.key -c sha1 -d -t 4")?;
    show(
        g,
        "ip route; ip route del 224.0.0.0/4; ip route del default; ip route; fence_xvm -o list -k /run/lab/fence.key -d -t 4",
    )?;
    show(g, "fence-daemon doctor --from-guest --key /run/lab/fence.key")?;
    show(
        g,
        "nft add table inet f; nft add chain inet f input '{ type filter hook input priority 0; policy drop; }'; nft add rule inet f input ct state established,related accept; nft -j list ruleset; fence-daemon doctor --from-guest --key /run/lab/fence.key",
    )?;
    show(hv, "fence-daemon -f /run/lab/fence_virt.conf doctor")?;
    show(
        hv,
        "cat /proc/net/ip_tables_names; which iptables; iptables -V; iptables -A INPUT -p udp --dport 1229 -j REJECT;  iptables -A OUTPUT -m string --algo bm --string x -j DROP; nft -j list ruleset; iptables-save",
    )?;
    Ok(())
}
