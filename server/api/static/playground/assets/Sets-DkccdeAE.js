import{a as o,f as r}from"./index-C4Od5-EE.js";var p=r("<h1>Support sets</h1>");function e(t){var a=p();o(t,a)}export{e as default};
