import { tellTogether } from "./together.ts";

await tellTogether("rebalance", "127.0.79");
